"""Time, memory and accuracy of Essential Subspace Merging on ViT-B/32's shapes, beside the same steps with one SVD for each decomposition.

    python benchmarks/esm.py [--experts 8] [--blocks 12] [--width 768] [--rows 1600] [--device cpu] [--json FILE]

Random task vectors, random inputs of 32 images with 50 tokens. The plain way takes the released code's steps in float32: an SVD of each
task's shift x ΔWᵀ, one of all bases side by side, one of all coordinates; TSV-M for the output projections. It goes block by block, like
`esm`, so both are given one block at a time and neither holds more than that block's inputs. `seconds` is the sum over blocks, `MiB` the
peak above what the inputs take (a last row gives `esm` all blocks at once, where the result itself counts too), `error` the relative Frobenius error of the worst matrix of the first block against the plain way in float64.
The factor between layers is 1 in a single block; it costs a norm for each matrix.
"""
import argparse
import torch
from measure import random_matrix, task_vector_of, timed
from subspace_nb.esm import esm
from subspace_nb.score import environment, write_json
from subspace_nb.tasks import TaskVector, default_device


def relative(v): return v/v.mean()


def svd_polar(m):
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u@vh, s.mean()


def plain_matrix(dws, xs):
    "Steps 1 to 5 to the letter."
    n, out = len(dws), len(dws[0])
    k, bases, coords, norms = out//n, [], [], []
    for dw, x in zip(dws, xs):
        _, s, vh = torch.linalg.svd(x@dw.mT, full_matrices=False)
        e, lam = torch.eye(out, dtype=dw.dtype, device=dw.device), dw.new_zeros(out)
        e[:, :len(s)], lam[:len(s)] = vh.mT, s**2/(len(x)-1)
        a = e.mT@dw
        w = relative((lam[:k]/lam[:k].mean())**.15)
        norms.append(a.norm()); bases.append(e[:, :k]*w); coords.append(a[:k]*w[:, None])
    a = torch.cat([c*r**2 for c, r in zip(coords, relative(torch.stack(norms)))])
    a = a*relative(a.norm(dim=0))**2
    (up, mean_p), (ua, mean_a) = svd_polar(torch.cat(bases, 1)), svd_polar(a)
    return 2*mean_p*mean_a*up@ua


def plain_tsv(dws):
    k = min(dws[0].shape)//len(dws)
    us, ss, vhs = zip(*(torch.linalg.svd(d, full_matrices=False) for d in dws))
    return svd_polar(torch.cat([u[:, :k] for u in us], 1))[0]@torch.diag(torch.cat([s[:k] for s in ss]))@svd_polar(torch.cat([v[:k] for v in vhs]))[0]


def plain(taus, inputs, device, dtype=torch.float32):
    "One block, one SVD for each decomposition."
    work = lambda ts: [t.to(device, dtype) for t in ts]
    merge = lambda k: plain_matrix(work(t[k] for t in taus), work(x[k] for x in inputs)) if k in inputs[0] else plain_tsv(work(t[k] for t in taus))
    return {k: merge(k).cpu() for k in taus[0]}


def block_of(i, experts, width, rows):
    "Task vectors and inputs of one block, the same whenever asked for."
    taus = [task_vector_of(1, width, 1000*i+t) for t in range(experts)]
    rng = torch.Generator().manual_seed(i)
    turn = torch.linalg.qr(torch.randn(width, width, generator=rng))[0]
    shape = lambda k: taus[0][k].shape
    sample = lambda k: torch.randn(rows, shape(k)[1], generator=rng) if shape(k)[1]!=width else 1e3*random_matrix((rows, width), turn, 'power', rng)
    return taus, [{k: sample(k) for k in taus[0] if 'out_proj' not in k} for _ in range(experts)]


def worst(out, ref): return max(((out[k].double()-ref[k]).norm()/ref[k].norm()).item() for k in ref)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(experts=8, blocks=12, width=768, rows=1600).items(): p.add_argument(f'--{name}', type=int, default=value)
    p.add_argument('--device', default=str(default_device())); p.add_argument('--json', help='write the table here too')
    a = p.parse_args()
    device = torch.device(a.device)
    print(f"{a.experts} task vectors, {a.blocks} blocks, width {a.width}, {a.rows} rows, float32, on {environment()['device']}, torch {torch.__version__}", flush=True)
    ways = {'torch.linalg.svd': lambda taus, xs: plain(taus, xs, device), 'esm': lambda taus, xs: esm(taus, xs, device=device)}
    for fn in ways.values(): fn(*block_of(0, a.experts, 64, 100))                  # warm up
    runs = {way: [] for way in ways}
    for i in range(a.blocks):
        taus, xs = block_of(i, a.experts, a.width, a.rows)
        ref = plain(taus, xs, device, torch.float64) if i==0 else {}
        for way, fn in ways.items():
            seconds, mib, out = timed(lambda: fn(taus, xs), device)
            runs[way].append((seconds, mib, worst(out, ref) if ref else 0.))
            print(f"block {i:>2}  {way:20}{seconds:>8.1f} s{mib:>7.0f} MiB"+(f"  error {runs[way][-1][2]:.1e}" if ref else ''), flush=True)
    everything = [block_of(i, a.experts, a.width, a.rows) for i in range(a.blocks)]
    whole = lambda j, kind: [kind({k.replace('.0.', f'.{i}.'): v for i, b in enumerate(everything) for k, v in b[j][e].items()}) for e in range(a.experts)]
    taus, xs = whole(0, TaskVector), whole(1, dict)
    runs['esm, all blocks in one call'] = [(*timed(lambda: esm(taus, xs, device=device))[:2], 0.)]
    total = {way: sum(r[0] for r in rs) for way, rs in runs.items()}
    rows = [dict(method=way, blocks=a.blocks, seconds=round(total[way], 1), MiB=round(max(r[1] for r in rs)),
                 error=max(r[2] for r in rs) or None, ours_is_faster=round(total[way]/total['esm'], 2)) for way, rs in runs.items()]
    for r in rows: print(f"{r['method']:28}{r['seconds']:>9.1f} s{r['ours_is_faster']:>7.2f}×{r['MiB']:>7} MiB{r['error'] or float('nan'):>10.1e}")
    if a.json: write_json(a.json, dict(meta=dict(settings={k: v for k, v in vars(a).items() if k!='json'}, **environment()), rows=rows))


if __name__=='__main__': main()
