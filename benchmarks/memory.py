"""Peak memory of merging from files, method by method, beside the bound of one matrix for each expert and 512 MiB.

    python benchmarks/memory.py [--methods M …] [--cases 20:4096x1024:full …] [--rank 16] [--json FILE]

Each row is a process of its own, which merges one matrix of a base and its experts in float32: for twenty experts the two MLP weights of
ViT-L/14, for two an MLP weight of a language model, unless `--cases` says otherwise. `full`: the experts' changes are random matrices with
a power-law spectrum; `lora`: products of rank `--rank`, stored as full matrices, so that even all of them together leave directions empty.
`boosting` is task arithmetic, boosted. `MiB` is the largest anonymous memory of the process (Linux) above its level before the merge:
mapped files do not count, since the system takes them back at will. `bound` is one matrix for each expert and 512 MiB. Rows that the file
has are kept.
"""
import argparse, json, subprocess, sys, tempfile, threading, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from measure import decay
from subspace_nb.score import Results
from subspace_nb.stream import merge_files, methods

key = 'visual.transformer.resblocks.0.mlp.c_fc.weight'


def anonymous():
    "MiB of this process that are no mapped file."
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))/1024


def change(shape, kind, rank, rng):
    "A random change of a weight."
    if kind=='lora': return 1e-3*torch.randn(shape[0], rank, generator=rng)@torch.randn(rank, shape[1], generator=rng)
    turn = torch.linalg.qr(torch.randn(min(shape), min(shape), generator=rng))[0]
    w = torch.randn(shape, generator=rng)
    return .02*(w*decay(shape[1], 'power') if shape[0]>=shape[1] else decay(shape[0], 'power')[:, None]*w)@(turn if shape[0]>=shape[1] else torch.eye(shape[1]))


def write_inputs(folder, n, shape, kind, rank):
    "A base, experts and what enters their layers."
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(0)
    base = .02*torch.randn(shape, generator=rng)
    save_file({key: base}, folder/'base.safetensors')
    for i in range(n):
        save_file({key: base+change(shape, kind, rank, rng)}, folder/f'expert_{i}.safetensors')
        save_file({key: torch.randn(800, shape[1], generator=rng)}, folder/f'inputs_{i}.safetensors')


def measured(folder, n, method):
    "In a process of its own: seconds and peak MiB of one merge."
    method, options = ('task_arithmetic', dict(beta=0.)) if method=='boosting' else (method, {})
    if methods[method].inputs: options['inputs'] = [folder/f'inputs_{i}.safetensors' for i in range(n)]
    torch.linalg.eigh(torch.eye(64)@torch.eye(64))                                  # the libraries are loaded
    start = peak = anonymous()
    on = True
    def watch():
        nonlocal peak
        while on: peak = max(peak, anonymous()); time.sleep(.003)
    thread = threading.Thread(target=watch); thread.start()
    t = time.perf_counter()
    try: merge_files(folder/'base.safetensors', [folder/f'expert_{i}.safetensors' for i in range(n)], folder/f'out_{method}', method, device='cpu', overwrite=True, **options)
    finally: on = False; thread.join()
    return dict(took=round(time.perf_counter()-t, 1), MiB=round(peak-start))


def measure(folder, n, method):
    "A row's numbers, from another process."
    r = subprocess.run([sys.executable, __file__, '--child', str(folder), str(n), method], stdout=subprocess.PIPE, text=True)
    if r.returncode: raise RuntimeError(f"{method} failed")
    return json.loads(r.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = ['boosting', *(m for m in methods if methods[m].listed)]
    p.add_argument('--methods', nargs='+', choices=listed, default=listed)
    p.add_argument('--cases', nargs='+', default=[f'20:{s}:{k}' for k in ('full', 'lora') for s in ('4096x1024', '1024x4096')]+['2:5504x2048:full'], help='experts:shape:kind')
    p.add_argument('--rank', type=int, default=16); p.add_argument('--json', default='nbs/results/memory.json', help='file of the rows'); p.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: print(json.dumps(measured(Path(a.child[0]), int(a.child[1]), a.child[2]))); return
    if not Path('/proc/self/status').exists(): p.error('memory is read from /proc/self/status, which this system does not have')
    results = Results(a.json, rank=a.rank, threads=torch.get_num_threads(), device='cpu', dtype='float32')
    for case in a.cases:
        n, size, kind = case.split(':')
        n, shape = int(n), tuple(map(int, size.split('x')))
        todo = [m for m in a.methods if not results.find(method=m, shape=size, kind=kind, experts=n)]
        if not todo: continue
        bound = round(n*4*shape[0]*shape[1]/2**20+512)
        with tempfile.TemporaryDirectory() as scratch:
            write_inputs(Path(scratch), n, shape, kind, a.rank)
            for method in todo:
                r = results.row(lambda: measure(Path(scratch), n, method) | dict(bound=bound), method=method, shape=size, kind=kind, experts=n)
                print(f"{method:24}{size:12}{kind:6}N = {n:<4}{r['took']:>8.1f} s{r['MiB']:>8} of {bound} MiB", flush=True)


if __name__=='__main__': main()
