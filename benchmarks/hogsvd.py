"""Time of HO-GSVD against its definition's pairwise quotients, side by side in one run.

    python benchmarks/hogsvd.py [--experts 4 8 20] [--width 128 768] [--pi 0.01] [--device cpu] [--json FILE]

N random matrices n × n in float64 with a power-law spectrum. The definition builds all N(N-1) quotients of Eq. 31, each with a solve,
and the nonsymmetric eigenproblem, then the left vectors; `hogsvd` does the same work with N factorizations and one symmetric
eigenproblem. `seconds` is the wall clock; `CPU s` is the processor time of all threads, which other work on the machine leaves alone (on a
GPU: the wall clock). `per expert` and `times`, the definition's time over ours, go by it. `rebuild` is the largest relative error of
UᵢΣᵢVᵀ against its matrix, `values` the largest relative difference between the two ways' eigenvalues λ. Last, the Alignment Matrix of the
embedded pool: twenty experts, every matrix of the model.
"""
import argparse, time
import torch
from measure import decay, timed
from subspace_nb.alignment import alignment_by_matrix, mean_alignment
from subspace_nb.experts import Pool
from subspace_nb.hogsvd import hogsvd, quotient_mean
from subspace_nb.score import environment, write_json
from subspace_nb.tasks import default_device


def experts(count, n, device):
    "Matrices with a power-law spectrum, each turned its own way on both sides."
    rng = torch.Generator().manual_seed(0)
    turn = lambda: torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))[0]
    return [(turn()*decay(n, 'power').double()@turn().mT).to(device) for _ in range(count)]


def definition(mats, pi):
    "The decomposition from Eqs. 31 and 32 as written: λ ascending, left vectors, generalized singular values, V."
    lam, v = torch.linalg.eig(quotient_mean(mats, pi))
    order = lam.real.argsort()
    v = v.real[:, order].contiguous()
    bs = [torch.linalg.solve(v, a.mT).mT for a in mats]
    sizes = [b.norm(dim=0) for b in bs]
    return lam.real[order], [b/s for b, s in zip(bs, sizes)], sizes, v


def rebuild_error(mats, us, sizes, v): return max((((u*s)@v.mT-a).norm()/a.norm()).item() for u, s, a in zip(us, sizes, mats))


def clocked(fn, device):
    "Wall seconds, processor seconds, peak MiB and the result of a call."
    t = time.process_time(); wall, mib, out = timed(fn, device); cpu = time.process_time()-t
    return wall, cpu if device.type=='cpu' else wall, mib, out


def measure(count, n, pi, device):
    "Two rows: the definition and `hogsvd`, the better of two calls, on the same matrices."
    mats = experts(count, n, device)
    slow = clocked(lambda: definition(mats, pi), device)
    lam, us, sizes, v = slow[-1]
    error = rebuild_error(mats, us, sizes, v)
    del us, v
    fast = min((clocked(lambda: hogsvd(mats, pi), device) for _ in range(2)), key=lambda r: r[1])
    d = fast[-1]
    apart = ((d.lam-lam).abs()/lam).max().item()
    row = lambda method, run, error: dict(method=method, n=n, experts=count, seconds=round(run[0], 3), cpu=round(run[1], 3), per_expert=round(run[1]/count, 4),
                                          times=round(slow[1]/run[1], 1), MiB=round(run[2]), rebuild=error, values=apart)
    return [row('pairwise quotients', slow, error), row('hogsvd', fast, rebuild_error(mats, d.us, d.sigmas, d.v))]


def whole_model(pi, device):
    "Time of the Alignment Matrix over a whole model."
    taus = Pool.embedded().task_vectors()
    def run():
        parts = alignment_by_matrix(taus, pi, device=device)
        return len(parts), mean_alignment(parts)
    wall, cpu, mib, (count, _) = clocked(run, device)
    return dict(experts=len(taus), matrices=count, seconds=round(wall, 1), cpu=round(cpu, 1), MiB=round(mib))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--experts', type=int, nargs='+', default=[4, 8, 20]); p.add_argument('--width', type=int, nargs='+', default=[128, 768])
    p.add_argument('--pi', type=float, default=1e-2); p.add_argument('--device', default=str(default_device())); p.add_argument('--json', help='write the table here too')
    a = p.parse_args()
    device = torch.device(a.device)
    print(f"float64, pi {a.pi:g}, on {environment()['device']}, torch {torch.__version__}", flush=True)
    hogsvd(experts(3, 16, device), a.pi)                                       # warm up
    rows = []
    print(f"{'method':20}{'n':>5}{'experts':>9}{'seconds':>10}{'CPU s':>9}{'per expert':>12}{'times':>8}{'MiB':>7}{'rebuild':>10}{'values':>10}")
    for n in a.width:
        for count in a.experts:
            for r in measure(count, n, a.pi, device):
                rows.append(r)
                print(f"{r['method']:20}{r['n']:>5}{r['experts']:>9}{r['seconds']:>10.3f}{r['cpu']:>9.3f}{r['per_expert']:>12.4f}{r['times']:>7.1f}×{r['MiB']:>7}{r['rebuild']:>10.1e}{r['values']:>10.1e}", flush=True)
    whole = whole_model(a.pi, device)
    print(f"Alignment Matrix of {whole['experts']} experts over {whole['matrices']} matrices: {whole['seconds']} s, {whole['cpu']} CPU s, {whole['MiB']} MiB")
    if a.json: write_json(a.json, dict(meta=dict(settings={k: v for k, v in vars(a).items() if k!='json'}, **environment()), rows=rows, alignment=whole))


if __name__=='__main__': main()
