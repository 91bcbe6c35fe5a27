"""Time and memory of the spectral methods on ViT-B/32's shapes, side by side in one run.

    python benchmarks/bench.py [--experts 8] [--blocks 12] [--width 768] [--device cpu] [--json FILE]

Each task vector is handled by each way in turn, so that a drifting machine slows all. `seconds` is the sum over the task vectors;
`ours is faster` is the median ratio to `subspace_boosting`, vector by vector; `MiB` is the peak of the process above what the
inputs take (on a GPU: of the device's allocator); `error` is the relative Frobenius error of the worst matrix against Algorithm 1
in float64, on the first task vector. A plain SVD in float32 is not accurate to 1e-5 on square matrices with faint directions,
so on one of the vectors the plain way runs in float64 too.
"""
import argparse, os, statistics, threading, time
from pathlib import Path
import torch
from subspace_nb.boost import subspace_boosting
from subspace_nb.score import environment, write_json
from subspace_nb.spectra import lift
from subspace_nb.tasks import TaskVector, default_device, in_block, row_slices

page = os.sysconf('SC_PAGE_SIZE') if hasattr(os, 'sysconf') else 4096


class PeakMemory:
    "Peak memory in MiB above the level at entry, sampled every two milliseconds."
    def __init__(self, device): self.cuda = device.type=='cuda'
    def level(self): return int(Path('/proc/self/statm').read_text().split()[1])*page if Path('/proc/self/statm').exists() else 0

    def __enter__(self):
        if self.cuda: torch.cuda.reset_peak_memory_stats(); self.start = torch.cuda.memory_allocated(); return self
        self.start = self.peak = self.level(); self.on = True
        self.thread = threading.Thread(target=self.watch, daemon=True); self.thread.start()
        return self

    def watch(self):
        while self.on: self.peak = max(self.peak, self.level()); time.sleep(.002)

    def __exit__(self, *_):
        if self.cuda: self.peak = torch.cuda.max_memory_allocated()
        else: self.on = False; self.thread.join()
        self.mib = (self.peak-self.start)/2**20


def decay(n, kind):
    "Scales of a spectrum: a power law as of merged task vectors, or evenly spread in logarithm down to 1e-6."
    i = torch.arange(1, n+1, dtype=torch.float64)
    return {'power': i**-.7, 'ill': torch.logspace(0, -6, n, dtype=torch.float64)}[kind].float()


def random_matrix(shape, turn, kind, rng):
    "Gaussian rows, scaled along the smaller side and turned there."
    n = min(shape)
    tall = torch.randn(max(shape), n, generator=rng)*decay(n, kind)@turn
    return (tall if shape[0]>=shape[1] else tall.mT).contiguous()*1e-3


def task_vector_of(blocks, width, seed):
    "One random task vector of CLIP's shapes; the output projection of every fourth block is ill-conditioned."
    rng = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=rng))[0]
    shapes = {'attn.in_proj_weight': (3*width, width), 'attn.out_proj.weight': (width, width),
              'mlp.c_fc.weight': (4*width, width), 'mlp.c_proj.weight': (width, 4*width)}
    kind = lambda block, name: 'ill' if name=='attn.out_proj.weight' and block%4==0 else 'power'
    return TaskVector({f'visual.transformer.resblocks.{b}.{name}': random_matrix(shape, turn, kind(b, name), rng)
                       for b in range(blocks) for name, shape in shapes.items()})


def algorithm_1(dw, beta):
    "The paper's pseudocode: one SVD of one matrix."
    u, s, vh = torch.linalg.svd(dw, full_matrices=False)
    return u@torch.diag(lift(s, beta))@vh


def plain(tau, beta, device):
    "Algorithm 1 matrix by matrix, q, k and v apart."
    cut = lambda k, w: torch.cat([algorithm_1(w[rows].to(device), beta) for _, rows in row_slices(k, w, 'per_qkv')]).to(w.device)
    return tau.map(lambda k, w: cut(k, w) if in_block(k, w) else w)


def worst_error(tau, out, beta):
    "Largest relative error over the matrices, against Algorithm 1 in float64."
    errors = []
    for k, w in tau.items():
        for _, rows in row_slices(k, w, 'per_qkv'):
            ref = algorithm_1(w[rows].double(), beta)
            errors.append(((out[k][rows].double()-ref).norm()/ref.norm()).item())
    return max(errors)


def timed(fn, device):
    "Seconds, peak MiB and the result of a call."
    sync = torch.cuda.synchronize if device.type=='cuda' else lambda: None
    sync()
    with PeakMemory(device) as memory:
        t = time.perf_counter(); out = fn(); sync(); seconds = time.perf_counter()-t
    return seconds, memory.mib, out


def measure(taus, beta, device, fine):
    "A row for each way, in turn on each task vector; the plain way in float64 too where `fine`."
    ours = 'subspace_boosting'
    ways = {'torch.linalg.svd': lambda tau: plain(tau, beta, device), ours: lambda tau: subspace_boosting(tau, beta, rank_tol=0, device=device)}
    if fine: ways['torch.linalg.svd in float64'] = lambda tau: plain(tau.to(torch.float64), beta, device).to(torch.float32)
    runs = {way: [] for way in ways}
    for i, tau in enumerate(taus):
        for way, fn in ways.items():
            seconds, mib, out = timed(lambda: fn(tau), device)
            runs[way].append((seconds, mib, worst_error(tau, out, beta) if i==0 else 0.))
            del out
    mine = [r[0] for r in runs[ours]]
    return [dict(method=way, beta=beta, vectors=len(taus), seconds=round(sum(r[0] for r in rs), 2), MiB=round(max(r[1] for r in rs)), error=max(r[2] for r in rs),
                 ours_is_faster=round(statistics.median(r[0]/m for r, m in zip(rs, mine)), 2)) for way, rs in runs.items()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--experts', type=int, default=8); p.add_argument('--blocks', type=int, default=12); p.add_argument('--width', type=int, default=768)
    p.add_argument('--device', default=str(default_device())); p.add_argument('--json', help='write the table here too')
    a = p.parse_args()
    device = torch.device(a.device)
    print(f"{a.experts} task vectors, {a.blocks} blocks, width {a.width}, float32, on {environment()['device']}, torch {torch.__version__}", flush=True)
    taus = [task_vector_of(a.blocks, a.width, seed) for seed in range(a.experts)]
    subspace_boosting(task_vector_of(1, 64, 0), device=device)                     # warm up
    rows = []
    print(f"{'method':30}{'β':>6}{'vectors':>9}{'seconds':>9}{'ours is faster':>16}{'MiB':>7}{'error':>10}")
    for beta, some, fine in ((0., taus, False), (0., taus[:1], True), (.02, taus[:1], True)):
        for r in measure(some, beta, device, fine):
            rows.append(r)
            print(f"{r['method']:30}{r['beta']:>6}{r['vectors']:>9}{r['seconds']:>9.2f}{r['ours_is_faster']:>15.2f}×{r['MiB']:>7}{r['error']:>10.1e}", flush=True)
    if a.json: write_json(a.json, dict(meta=dict(settings=vars(a), **environment()), rows=rows))


if __name__=='__main__': main()
