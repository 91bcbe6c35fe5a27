"""Shared by all tests: one thread, a modest and repeatable number of examples, small task vectors to merge."""
import pytest
import torch
from hypothesis import HealthCheck, settings

from subspace_nb.tasks import TaskVector

settings.register_profile('book', max_examples=25, deadline=None, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much])
settings.load_profile('book')

SHAPES = {'visual.conv1.weight': (3, 2, 2), 'visual.transformer.resblocks.0.attn.in_proj_weight': (12, 4),
          'visual.transformer.resblocks.0.mlp.c_fc.bias': (5,), 'visual.transformer.resblocks.1.attn.in_proj_weight': (12, 4),
          'visual.transformer.resblocks.2.mlp.c_fc.weight': (6, 4), 'transformer.resblocks.0.mlp.c_fc.weight': (6, 4),
          'transformer.resblocks.1.mlp.c_fc.weight': (6, 4), 'logit_scale': ()}

def make_tau(seed, dtype=torch.float64, shapes=SHAPES):
    rng = torch.Generator().manual_seed(7000+seed)
    return TaskVector({k: torch.randn(s, generator=rng, dtype=torch.float64).to(dtype) for k, s in shapes.items()})

def make_taus(n, dtype=torch.float64, seed=0, shapes=SHAPES):
    return [make_tau(1000*seed+i, dtype, shapes) for i in range(n)]

def gap(a, b): # relative Frobenius distance, in float64
    a, b = a.double(), b.double()
    return ((a-b).norm()/b.norm().clamp_min(1e-300)).item()

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
