"""Time and memory of TSV-M, Iso-C and Iso-CTS on ViT-B/32's shapes, beside one plain SVD per matrix, in one run.

    python benchmarks/rivals.py [--experts 8] [--blocks 12] [--width 768] [--methods tsv_m iso_c iso_cts] [--device cpu] [--json FILE]

The plain way is written as the authors' code is: one float32 `torch.linalg.svd` of every matrix and of every concatenation. Each
block of the model goes through both ways in turn, so that a drifting machine slows both. `seconds` is the sum over the blocks;
`ours is faster` is the median ratio, block by block; `MiB` is the peak of the process above what the inputs take, with the result
(on a GPU: of the device's allocator), for ours of a merge of the whole model in one call; `error` is the relative Frobenius error
of the worst matrix of the first block against the plain way in float64. Its output projection is ill-conditioned on purpose.
"""
import argparse, statistics
import torch
from measure import task_vector_of, timed
from subspace_nb.rivals import iso_c, iso_cts, tsv_m
from subspace_nb.score import environment, write_json
from subspace_nb.tasks import TaskVector, block_index, default_device


def svd(w): return torch.linalg.svd(w, full_matrices=False)


def whiten(w):
    u, _, vh = svd(w)
    return u@vh


def plain_tsv_m(ws):
    k = int(min(ws[0].shape)*(1/len(ws)))
    us, ss, vhs = zip(*((u[:, :k], s[:k], vh[:k]) for u, s, vh in map(svd, ws)))
    return whiten(torch.cat(us, 1))@torch.diag(torch.cat(ss))@whiten(torch.cat(vhs))


def plain_iso_c(ws):
    u, s, vh = svd(sum(ws))
    return s.mean()*u@vh


def plain_iso_cts(ws, common=.8):
    r, n = min(ws[0].shape), len(ws)
    k = round((r-int(r*common))/n)
    c = r-k*n
    u, s, vh = svd(sum(ws))
    parts = [svd(w-u[:, :c]@(u[:, :c].mT@w)) for w in ws]
    us, ss, vhs = zip(*((a[:, :k], b[:k], d[:k]) for a, b, d in parts), (u[:, :c], s[:c], vh[:c]))
    return torch.cat(ss).mean()*whiten(torch.cat(us, 1))@whiten(torch.cat(vhs))


ways = dict(tsv_m=(tsv_m, plain_tsv_m), iso_c=(iso_c, plain_iso_c), iso_cts=(iso_cts, plain_iso_cts))


def plain(taus, matrix, device):
    "One matrix after the other; these task vectors have nothing else."
    return taus[0].map(lambda k, w: matrix([t[k].to(device) for t in taus]).to(w.device))


def worst_error(out, ref): return max(((out[k].double()-w).norm()/w.norm()).item() for k, w in ref.items())


def measure(name, taus, device):
    "A row for the plain way and one for ours, block by block."
    ours, matrix = ways[name]
    runs = {'torch.linalg.svd': [], name: []}
    depth = 1+max(block_index(k) for k in taus[0])
    for b in range(depth):
        block = [TaskVector({k: w for k, w in t.items() if block_index(k)==b}) for t in taus]
        ref = plain([t.to(torch.float64) for t in block], matrix, device) if b==0 else None
        for way, fn in (('torch.linalg.svd', lambda: plain(block, matrix, device)), (name, lambda: ours(block, device=device))):
            seconds, mib, out = timed(fn, device)
            runs[way].append((seconds, mib, worst_error(out, ref) if ref else 0.))
            del out
    whole = timed(lambda: ours(taus, device=device), device)[:2] if depth>1 else runs[name][0][:2]
    ratio = statistics.median(p[0]/m[0] for p, m in zip(*runs.values()))
    return [dict(method=f'{name}: {way}' if way!=name else name, seconds=round(sum(r[0] for r in rs), 2), ours_is_faster=round(ratio, 2) if way!=name else 1.,
                 MiB=round(whole[1] if way==name else max(r[1] for r in rs)), error=rs[0][2]) for way, rs in runs.items()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--experts', type=int, default=8); p.add_argument('--blocks', type=int, default=12); p.add_argument('--width', type=int, default=768)
    p.add_argument('--methods', nargs='+', choices=list(ways), default=list(ways))
    p.add_argument('--device', default=str(default_device())); p.add_argument('--json', help='write the table here too')
    a = p.parse_args()
    device = torch.device(a.device)
    print(f"{a.experts} task vectors, {a.blocks} blocks, width {a.width}, float32, on {environment()['device']}, torch {torch.__version__}", flush=True)
    taus = [task_vector_of(a.blocks, a.width, seed) for seed in range(a.experts)]
    small = [task_vector_of(1, 64, seed) for seed in range(2)]
    rows = []
    print(f"{'method':30}{'seconds':>9}{'ours is faster':>16}{'MiB':>7}{'error':>10}")
    for name in a.methods:
        ways[name][0](small, device=device); plain(small, ways[name][1], device)                 # warm up
        for r in measure(name, taus, device):
            rows.append(r)
            print(f"{r['method']:30}{r['seconds']:>9.2f}{r['ours_is_faster']:>15.2f}×{r['MiB']:>7}{r['error']:>10.1e}", flush=True)
    if a.json: write_json(a.json, dict(meta=dict(settings={k: v for k, v in vars(a).items() if k!='json'}, **environment()), rows=rows))


if __name__=='__main__': main()
