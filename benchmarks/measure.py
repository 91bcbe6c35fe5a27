"""What the benchmarks share: a clock with a memory gauge, and random task vectors of CLIP's shapes"""
import torch
from subspace_nb.score import timed
from subspace_nb.tasks import TaskVector


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
