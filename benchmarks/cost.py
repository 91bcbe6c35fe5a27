"""Seconds and peak memory of every method, beside the same by plain SVDs, matrix shape by matrix shape: the rows behind chapter 33.

    python benchmarks/cost.py [--parts table plain law large blocks] [--seconds 110] [--threads 2] [--device cpu] [--json FILE]

A row is one method on random matrices of one shape for N experts: `each` is the time of one matrix, the shortest of up to three runs,
`MiB` the peak above the inputs. Ours runs on one matrix for each thread at once, as it does in a model; the plain way, one float32
`torch.linalg.svd` for each decomposition, takes one matrix after the other. Rows that the file has are kept: stop it whenever you like
(or by `--seconds`) and start it again. `table` and `plain` are ViT-B/32's shapes for 2, 8 and 20 experts, `law` other widths, `large`
ViT-L/14's and one of width 4096, `blocks` three whole blocks in one call, to check the sum of matrices against.
`python benchmarks/elsewhere.py` adds mergekit and fusion-bench.
"""
import argparse, time
import torch
from boost import algorithm_1
from esm import plain_matrix, plain_tsv, svd_polar
from hogsvd import definition
from rivals import plain_iso_c, plain_iso_cts, plain_tsv_m
from subspace_nb.cost import best_of, methods, part_name, pieces, proxy_rows, random_experts, time_matrix, vit_shapes
from subspace_nb.score import Results
from subspace_nb.spectra import lift
from subspace_nb.tasks import TaskVector, default_device

sizes = 2, 8, 20
spectral = [m for m, how in methods.items() if how.side]


def plain_higher(ws, pi=1e-2):
    "Algorithm 2 with the decomposition as it is defined: all quotients, one nonsymmetric eigenproblem."
    _, us, sigmas, v = definition([w.double() for w in ws], pi)
    s, order = sum(sigmas).sort(descending=True)
    lifted = torch.empty_like(s).scatter_(-1, order, lift(s, 0.))
    return (svd_polar(sum(us))[0]*lifted)@svd_polar(v)[0].mT


plain = {'boosting': lambda ws, xs: algorithm_1(sum(ws), 0.), 'iso_c': lambda ws, xs: plain_iso_c(ws), 'iso_cts': lambda ws, xs: plain_iso_cts(ws),
         'tsv_m': lambda ws, xs: plain_tsv_m(ws), 'esm': lambda ws, xs: plain_matrix(ws, xs) if xs else plain_tsv(ws),
         'higher_order_boosting': lambda ws, xs: plain_higher(ws)}


def time_plain(method, n, out, inp, device):
    "As `time_matrix`, for the plain way: one matrix."
    taus, xs = random_experts(n, out, inp, 1, method=='esm', device)
    k = part_name(out, inp)
    ws, xs = [t[k] for t in taus], [x[k] for x in xs if k in x]
    seconds, mib = best_of(lambda: plain[method](ws, xs), device)
    return dict(count=1, each=float(f'{seconds:.4g}'), MiB=round(max(0., mib), 1))


def time_ours(method, n, out, inp, device):
    "A row's numbers: one matrix for each thread, or one alone where it is large."
    r = time_matrix(method, n, out, inp, 1 if (inp if method=='higher_order_boosting' else min(out, inp))>2000 else None, device)
    return {k: r[k] for k in ('count', 'each', 'MiB')}


def time_blocks(method, n, blocks, width, device):
    "Whole blocks in one call: what the sum over matrices must come to."
    shapes = vit_shapes(width, blocks)
    parts = [random_experts(n, *s, count=blocks, device=device) for s in dict.fromkeys(shapes.values())]
    taus = [TaskVector({k: w for p in parts for k, w in p[0][t].items()}) for t in range(n)]
    seconds, mib = best_of(lambda: methods[method].run(taus, [{}]*n, device), device, 2)
    return dict(took=round(seconds, 3), MiB=round(mib, 1))


def jobs(part):
    "Rows of one part: (way, method, experts, out, in), or (\"blocks\", method, experts, blocks, width)."
    at = lambda w: ((w, w), (4*w, w), (w, 4*w))
    entry = [m for m in methods if m not in spectral]
    form = lambda m, width: pieces(vit_shapes(width, 1), m)[0]                  # the shapes of a block
    wide = lambda m, s: m=='higher_order_boosting' and s[1]>2000                # hours by its definition
    if part=='table': return [('ours', m, n, *s) for n in sizes for m in methods for s in form(m, 768)]
    if part=='plain': return [('plain', m, n, *s) for n in sizes for m in plain for s in form(m, 768) if not wide(m, s)]
    if part=='law':
        grid = [(96, 8), *((w, n) for w in (192, 384) for n in sizes), (384, 4), (384, 14)]
        return [('ours', m, n, *s) for w, n in grid for m in spectral for s in at(w)] + [('ours', m, n, *s) for n in sizes for m in entry for s in at(384)] \
            + [('plain', m, n, *s) for m in plain for w, n in ((192, 8), (384, 8)) for s in at(w) if not (m=='higher_order_boosting' and w>192 and s[1]>w)]
    if part=='large':
        some = ('boosting', 20), ('iso_c', 20), ('tsv_m', 2), ('tsv_m', 20), ('esm', 2), ('higher_order_boosting', 20)
        return [('ours', m, n, *s) for m, n in some for s in form(m, 1024) if not wide(m, s)] + [('ours', m, 20, 4096, 1024) for m in entry] \
            + [('plain', m, 2, *s) for m in ('boosting', 'tsv_m') for s in form(m, 1024)] + [('ours', 'boosting', 2, 4096, 4096)]
    some = 'task_arithmetic', 'consensus', 'ties', 'boosting', 'iso_c', 'iso_cts', 'tsv_m'
    return [('blocks', m, 8, 3, 768) for m in some]+[('blocks', m, 8, b, 192) for b in (1, 2, 4, 8, 12) for m in some]


def key_of(job): return dict(zip(('way', 'method', 'experts', *(('blocks', 'width') if job[0]=='blocks' else ('out', 'inp'))), job))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = 'table', 'plain', 'law', 'large', 'blocks'
    p.add_argument('--parts', nargs='+', choices=names, default=names); p.add_argument('--seconds', type=float, default=1e9, help='stop after the row that this ends in')
    p.add_argument('--threads', type=int, default=torch.get_num_threads()); p.add_argument('--device', default=str(default_device()))
    p.add_argument('--json', default='nbs/results/cost.json', help='file of the rows')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    device, begin = torch.device(a.device), time.perf_counter()
    results = Results(a.json, threads=a.threads, device=a.device, dtype='float32', rows=proxy_rows)
    todo = [j for part in a.parts for j in jobs(part) if not results.find(**key_of(j))]
    for m in methods: time_matrix(m, 2, 64, 32, device=device, repeats=1)         # warm up
    for i, job in enumerate(todo):
        way, m, n, out, inp = job
        if time.perf_counter()-begin>a.seconds: print(f'{len(todo)-i} rows are left: start again'); return 3
        work = {'ours': time_ours, 'plain': time_plain, 'blocks': time_blocks}[way]
        r = results.row(lambda: work(m, n, out, inp, device), **key_of(job))
        print(f"{i+1:>4}/{len(todo)}  {way:7}{m:24}N = {n:<4}{out:>6} × {inp:<6}{r.get('each', r.get('took')):>10.4f} s{r['MiB']:>9.0f} MiB{time.perf_counter()-begin:>8.0f} s", flush=True)


if __name__=='__main__': raise SystemExit(main())
