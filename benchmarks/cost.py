"""Seconds and peak memory of every method, beside the same by plain SVDs and, where installed, mergekit and fusion-bench: the one run behind chapter 33.

    python benchmarks/cost.py [--json FILE] [--mergekit DIR] [--fusion-bench DIR] [--parts table plain law large blocks files] [--seconds 110]
                              [--threads 2] [--device cpu] [--folder DIR]

A row is one method on random matrices of one shape for N experts: `each` is the time of one matrix, the faster of two calls, or the only
one where it takes half a second or more; `MiB` the peak above the inputs. Ours runs on one matrix for each thread at once, as it does in a
model; the plain way, one float32 `torch.linalg.svd` for each decomposition, takes one matrix after the other, as do ours where one is
large, KnOTS and RegMean. `table` and `plain` are ViT-B/32's shapes for 2, 8 and 20 experts (plain
SVDs of a minute and more are left to the law), `law` other widths, `large` ViT-L/14's and
one of width 4096, `blocks` whole blocks in one call, to check the sum of matrices against. `files` merges all of ViT-B/32's blocks from
safetensors files, ours, mergekit (task arithmetic, TIES) and fusion-bench (TSV-M, Iso-C) side by side (`benchmarks/elsewhere.py`).
DIR is a virtual environment: `python -m venv DIR && DIR/bin/pip install mergekit` (or `fusion-bench`); default: `elsewhere/mergekit` and
`elsewhere/fusion-bench` in the cache folder; a tool without one is left out. Its inputs take 8 GB in a temporary folder (in `--folder`).
Rows that the file has are kept: stop it whenever you like (or by `--seconds`) and start it again.
"""
import argparse, time
from functools import lru_cache
import torch
import elsewhere
from boost import algorithm_1
from esm import plain_matrix, plain_tsv, svd_polar
from hogsvd import definition
from rivals import plain_iso_c, plain_iso_cts, plain_tsv_m
from subspace_nb.cost import best_of, methods, part_name, pieces, proxy_rows, random_experts, time_matrix, vit_shapes
from subspace_nb.experts import cache_folder
from subspace_nb.merge import ties
from subspace_nb.score import Results
from subspace_nb.spectra import lift
from subspace_nb.tasks import TaskVector, default_device

sizes, repeats, depth, width = (2, 8, 20), 2, 12, 768
spectral = [m for m, how in methods.items() if how.side]


def plain_higher(ws, pi=1e-2):
    "Algorithm 2 with the decomposition as it is defined: all quotients, one nonsymmetric eigenproblem."
    _, us, sigmas, v = definition([w.double() for w in ws], pi)
    s, order = sum(sigmas).sort(descending=True)
    lifted = torch.empty_like(s).scatter_(-1, order, lift(s, 0.))
    return (svd_polar(sum(us))[0]*lifted)@svd_polar(v)[0].mT


def plain_knots(ws, cut=1e-5):
    "KnOTS by one SVD of all experts side by side; TIES is ours."
    u, s, vh = torch.linalg.svd(torch.cat(ws, 1), full_matrices=False)
    keep = s>cut
    return u[:, keep]@ties([TaskVector({'w': s[keep, None]*v[keep]}) for v in vh.chunk(len(ws), 1)])['w']


plain = {'boosting': lambda ws, xs: algorithm_1(sum(ws), 0.), 'iso_c': lambda ws, xs: plain_iso_c(ws), 'iso_cts': lambda ws, xs: plain_iso_cts(ws),
         'tsv_m': lambda ws, xs: plain_tsv_m(ws), 'esm': lambda ws, xs: plain_matrix(ws, xs) if xs else plain_tsv(ws),
         'higher_order_boosting': lambda ws, xs: plain_higher(ws), 'knots': lambda ws, xs: plain_knots(ws)}


@lru_cache(1)
def made(n, out, inp, count, inputs, device):
    "Experts, kept until others are asked for: rows on the same matrices follow each other."
    return random_experts(n, out, inp, count, inputs, device)


def taken(method, out, inp):
    "\"all\" where a method takes layer inputs for matrices of this shape, else \"\"."
    kind = methods[method].inputs
    return 'all' if kind=='all' or kind and out!=inp else ''


def matrices(method, n, out, inp, count, device):
    "The first `count` of the matrices that all rows of a shape share."
    taus, xs = made(n, out, inp, max(count, torch.get_num_threads()), taken(method, out, inp), device)
    names = [part_name(out, inp, b) for b in range(count)]
    return [TaskVector({k: t[k] for k in names}) for t in taus], [{k: x[k] for k in names if k in x} for x in xs]


def best(fn, device):
    "Seconds and MiB: the faster of two calls, or the only one where it takes half a second or more."
    seconds, mib = best_of(fn, device, repeats, .5)
    return seconds, round(max(0., mib), 1)


def time_plain(method, n, out, inp, device):
    "The plain way, on one matrix."
    taus, xs = matrices(method, n, out, inp, 1, device)
    seconds, mib = best(lambda: plain[method]([w for t in taus for w in t.values()], [x for d in xs for x in d.values()]), device)
    return dict(count=1, each=float(f'{seconds:.4g}'), MiB=mib)


def at_once(method, out, inp):
    "One matrix for each thread, or one alone where it is large or the method takes one after the other."
    alone = method in ('knots', 'regmean') or (inp if method=='higher_order_boosting' else min(out, inp))>2000
    return 1 if alone else torch.get_num_threads()


def time_ours(method, n, out, inp, device):
    "Ours, on as many matrices as it takes at once."
    count = at_once(method, out, inp)
    taus, xs = matrices(method, n, out, inp, count, device)
    seconds, mib = best(lambda: methods[method].run(taus, xs, device), device)
    return dict(count=count, each=float(f'{seconds/count:.4g}'), MiB=mib)


def time_blocks(method, n, blocks, width, device):
    "Whole blocks in one call: what the sum over matrices must come to."
    shapes = vit_shapes(width, blocks)
    parts = [random_experts(n, *s, count=blocks, device=device) for s in dict.fromkeys(shapes.values())]
    taus = [TaskVector({k: w for p in parts for k, w in p[0][t].items()}) for t in range(n)]
    seconds, mib = best(lambda: methods[method].run(taus, [{}]*n, device), device)
    return dict(took=round(seconds, 3), MiB=mib)


def jobs(part):
    "Rows of one part: (way, method, experts, out, in), or (\"blocks\", method, experts, blocks, width)."
    at = lambda w: ((w, w), (4*w, w), (w, 4*w))
    entry = [m for m in methods if m not in spectral]
    form = lambda m, w: pieces(vit_shapes(w, 1), m)[0]                          # the shapes of a block
    wide = lambda m, s: m=='higher_order_boosting' and s[1]>2000                # hours by its definition
    long = lambda m, n, s: wide(m, s) or m=='knots' and n*s[0]>40000             # a minute by one SVD
    if part=='table': return [('ours', m, n, *s) for n in sizes for m in methods for s in form(m, width)]
    if part=='plain': return [('plain', m, n, *s) for n in sizes for m in plain for s in form(m, width) if not long(m, n, s)]
    if part=='law':
        grid = [(96, 8), *((w, n) for w in (192, 384) for n in sizes), (384, 4)]
        return [('ours', m, n, *s) for w, n in grid for m in spectral for s in at(w)] + [('ours', m, n, *s) for n in sizes for m in entry for s in at(384)] \
            + [('plain', m, n, *s) for m in plain for w, n in ((192, 8), (384, 8)) for s in at(w) if not (m=='higher_order_boosting' and w>192 and s[1]>w)]
    if part=='large':
        some = ('boosting', 20), ('iso_c', 20), ('tsv_m', 2), ('tsv_m', 20)
        return [('ours', m, n, *s) for m, n in some for s in form(m, 1024)] + [('ours', m, 20, 4096, 1024) for m in entry] \
            + [('plain', m, 2, *s) for m in ('boosting', 'tsv_m') for s in form(m, 1024)] + [('ours', 'boosting', 2, 4096, 4096)]
    some = 'task_arithmetic', 'consensus', 'ties', 'boosting', 'iso_c', 'iso_cts', 'tsv_m'
    return [('blocks', m, 8, 3, 768) for m in some]+[('blocks', m, 8, b, 192) for b in (1, 2, 4, 8, 12) for m in some]


def in_order(todo):
    "Rows on the same matrices one after the other."
    return sorted(todo, key=lambda j: (j[0]=='blocks', *j[2:], taken(j[1], *j[3:]), j[0]))


def key_of(job): return dict(zip(('way', 'method', 'experts', *(('blocks', 'width') if job[0]=='blocks' else ('out', 'inp'))), job))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, home = ('table', 'plain', 'law', 'large', 'blocks', 'files'), cache_folder()/'elsewhere'
    p.add_argument('--json', default='nbs/results/cost.json', help='file of the rows')
    p.add_argument('--mergekit', default=home/'mergekit', help='its virtual environment'); p.add_argument('--fusion-bench', default=home/'fusion-bench', help='its virtual environment')
    p.add_argument('--parts', nargs='+', choices=names, default=names); p.add_argument('--seconds', type=float, default=1e9, help='stop after the row that this ends in')
    p.add_argument('--threads', type=int, default=torch.get_num_threads()); p.add_argument('--device', default=str(default_device()))
    p.add_argument('--folder', help='where to make the temporary folder of files')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    device, begin = torch.device(a.device), time.perf_counter()
    spent = lambda: time.perf_counter()-begin
    results = Results(a.json, threads=a.threads, device=a.device, dtype='float32', rows=proxy_rows, repeats=repeats)
    todo = in_order(dict.fromkeys(j for part in a.parts if part!='files' for j in jobs(part) if not results.find(**key_of(j))))
    for m in methods: time_matrix(m, 2, 64, 32, device=device, repeats=1)         # warm up
    for i, job in enumerate(todo):
        way, m, n, out, inp = job
        if spent()>a.seconds: print(f'{len(todo)-i} rows are left, and those from files: start again'); return 3
        work = {'ours': time_ours, 'plain': time_plain, 'blocks': time_blocks}[way]
        r = results.row(lambda: work(m, n, out, inp, device), **key_of(job))
        print(f"{i+1:>4}/{len(todo)}  {way:7}{m:24}N = {n:<4}{out:>6} × {inp:<6}{r.get('each', r.get('took')):>10.4f} s{r['MiB']:>9.0f} MiB{spent():>8.0f} s", flush=True)
    made.cache_clear()
    if 'files' not in a.parts: return 0
    if device.type!='cpu': print('from files: on the CPU only'); return 0
    envs = elsewhere.environments(a.mergekit, a.fusion_bench)
    todo = [key for key in elsewhere.jobs(envs, sizes, depth, width) if not results.find(**key)]
    if elsewhere.run_files(results, todo, envs, a.threads, a.folder, lambda: spent()>a.seconds): print(f'all rows are there after {spent():.0f} s'); return 0
    print('rows from files are left: start again'); return 3


if __name__=='__main__': raise SystemExit(main())
