"""Time and memory of the spectral methods on ViT-B/32's shapes, side by side in one run.

    python benchmarks/boost.py [--experts 8] [--blocks 12] [--width 768] [--device cpu] [--json FILE]

Each task vector is handled by each way in turn, so that a drifting machine slows all. `seconds` is the sum over the task vectors;
`ours is faster` is the median ratio to `subspace_boosting`, vector by vector; `MiB` is the peak of the process above what the
inputs take (on a GPU: of the device's allocator); `error` is the relative Frobenius error of the worst matrix against Algorithm 1
in float64, on the first task vector. A plain SVD in float32 is not accurate to 1e-5 on square matrices with faint directions,
so on one of the vectors the plain way runs in float64 too.
"""
import argparse, statistics
import torch
from measure import task_vector_of, timed
from subspace_nb.boost import subspace_boosting
from subspace_nb.score import environment, write_json
from subspace_nb.spectra import lift
from subspace_nb.tasks import default_device, in_block, row_slices


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
    if a.json: write_json(a.json, dict(meta=dict(settings={k: v for k, v in vars(a).items() if k!='json'}, **environment()), rows=rows))


if __name__=='__main__': main()
