"""What the benchmarks share: a clock with a memory gauge, and random task vectors of CLIP's shapes"""
import torch
from subspace_nb.cost import decay, random_matrix
from subspace_nb.score import timed
from subspace_nb.tasks import TaskVector


def task_vector_of(blocks, width, seed):
    "One random task vector of CLIP's shapes; the output projection of every fourth block is ill-conditioned."
    rng = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=rng))[0]
    shapes = {'attn.in_proj_weight': (3*width, width), 'attn.out_proj.weight': (width, width),
              'mlp.c_fc.weight': (4*width, width), 'mlp.c_proj.weight': (width, 4*width)}
    kind = lambda block, name: 'ill' if name=='attn.out_proj.weight' and block%4==0 else 'power'
    return TaskVector({f'visual.transformer.resblocks.{b}.{name}': random_matrix(shape, turn, kind(b, name), rng)
                       for b in range(blocks) for name, shape in shapes.items()})
