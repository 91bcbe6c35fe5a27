"Subspace Boosting: against the paper's pseudocode, its invariances, and what it refuses."
import pytest, torch
from hypothesis import given, settings, strategies as st
from subspace_nb.boost import _boost_products, boost, is_attention, subspace_boosting
from subspace_nb.merge import lines, task_arithmetic, ties
from subspace_nb.spectra import map_spectrum_svd, stable_rank
from subspace_nb.tasks import TaskVector, attention_modes

shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))
shares = st.floats(0, 1)
fast = settings(max_examples=40, deadline=None)


def randn(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def algorithm_1(param, beta):
    "The paper's pseudocode in float64; the cutoff of an unreachable share is the last value."
    u, s, vh = torch.linalg.svd(param.double(), full_matrices=False)
    reached = (s.cumsum(0)/s.sum() >= beta).nonzero()
    return (u*s.clamp(min=s[int(reached[0]) if len(reached) else -1]))@vh


def model(width=128, blocks=2, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    shape = {'attn.in_proj_weight': (3*width, width), 'attn.in_proj_bias': (3*width,), 'attn.out_proj.weight': (width, width),
             'mlp.c_fc.weight': (2*width, width), 'mlp.c_proj.weight': (width, 2*width), 'ln_1.weight': (width,)}
    d = {f'visual.transformer.resblocks.{b}.{n}': torch.randn(s, generator=rng).to(dtype) for b in range(blocks) for n, s in shape.items()}
    return TaskVector(d | {'visual.positional_embedding': torch.randn(17, width, generator=rng).to(dtype), 'visual.proj': torch.randn(width, 32, generator=rng).to(dtype)})


@fast
@given(shapes, shares, st.integers(0, 10**6))
def test_equals_algorithm_1(shape, beta, seed):
    dw = randn(*shape, seed=seed)
    u, s, vh = torch.linalg.svd(dw.double())
    share = s.cumsum(0)/s.sum()
    if (share-beta).abs().min()<1e-6: return             # the cutoff itself hangs on rounding there
    ref = algorithm_1(dw, beta)
    for out in (boost(dw, beta, rank_tol=0), _boost_products(dw, beta, 0)): assert (out-ref).norm()<=1e-5*ref.norm()


@pytest.mark.parametrize('kappa', [1e1, 1e3, 1e5, 1e6])
@pytest.mark.parametrize('shape', [(60, 60), (120, 40), (40, 120)])
def test_ill_conditioned(kappa, shape):
    n = min(shape)
    q = lambda m, seed: torch.linalg.qr(randn(m, n, seed=seed, dtype=torch.float64))[0]
    dw = ((q(shape[0], 1)*torch.logspace(0, -torch.log10(torch.tensor(kappa)).item(), n, dtype=torch.float64))@q(shape[1], 2).mT).float()
    ref = algorithm_1(dw, 0.)
    assert (boost(dw)-ref).norm()<=1e-5*ref.norm()        # a smooth decay is no noise: nothing is dropped by default


@fast
@given(shapes, shares, st.floats(1e-3, 1e3))
def test_invariances(shape, beta, scale):
    dw = randn(*shape, seed=3, dtype=torch.float64)
    out = boost(dw, beta)
    q = torch.linalg.qr(randn(shape[0], shape[0], seed=4, dtype=torch.float64))[0]
    assert torch.allclose(boost(scale*dw, beta), scale*out, rtol=1e-6, atol=1e-9*scale)
    assert torch.allclose(boost(q@dw, beta), q@out, atol=1e-7)
    assert torch.allclose(boost(dw.mT, beta), out.mT, atol=1e-7)
    assert torch.allclose(boost(-dw, beta), -out, atol=1e-9)
    assert stable_rank(out)>=stable_rank(dw)*(1-1e-9)


def test_batch_equals_loop():
    dw = randn(2, 3, 20, 12)
    assert torch.allclose(boost(dw, .1), torch.stack([torch.stack([boost(m, .1) for m in row]) for row in dw]), atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_comes_back(dtype):
    dw = randn(20, 12, dtype=dtype)
    assert boost(dw).dtype==dtype
    assert all(v.dtype==dtype for v in subspace_boosting(model(dtype=dtype)).values())


def test_low_rank_stays_low_rank():
    lora = randn(40, 3)@randn(3, 30, seed=1)
    s = torch.linalg.svdvals(boost(lora))
    assert torch.allclose(s[:3], s[0].expand(3), rtol=1e-4) and (s[3:]<1e-4*s[0]).all()
    assert (torch.linalg.svdvals(boost(lora, rank_tol=0))>.9*s[0]).all()        # to the letter
    assert torch.equal(boost(torch.zeros(4, 3)), torch.zeros(4, 3))


@pytest.mark.parametrize('attention', attention_modes)
def test_attention_modes(attention):
    tau, key = model(), 'visual.transformer.resblocks.1.attn.in_proj_weight'
    parts = {'full_attn': 1, 'per_qkv': 3, 'per_head': 6}[attention]
    out = subspace_boosting(tau, .05, attention)
    ref = torch.cat([map_spectrum_svd(m, lambda s: s.maximum(s[..., (s.cumsum(-1)<.05*s.sum()).sum():][..., :1])) for m in tau[key].chunk(parts)])
    assert torch.allclose(out[key], ref, atol=1e-4)


def test_only_linear_layers_change():
    tau = model(); out = subspace_boosting(tau)
    changed = {k for k in tau if not torch.equal(tau[k], out[k])}
    assert changed=={k for k in tau if k.endswith(('in_proj_weight', 'out_proj.weight', 'c_fc.weight', 'c_proj.weight'))}
    assert list(out)==list(tau)


def test_attention_beta():
    tau = model(); out = subspace_boosting(tau, 1., attention_beta=0.); both = subspace_boosting(tau, 0.)
    for k in tau: assert torch.allclose(out[k], both[k] if is_attention(k) else tau[k], atol=1e-4), k


def test_names_of_transformers():
    assert all(map(is_attention, ['encoder.layer.0.attention.self.query.weight', 'encoder.layer.0.attention.output.dense.weight',
                                  'encoder.block.0.layer.0.SelfAttention.q.weight', 'vision_model.encoder.layers.0.self_attn.out_proj.weight']))
    assert not any(map(is_attention, ['encoder.layer.0.output.dense.weight', 'encoder.block.0.layer.1.DenseReluDense.wi.weight', 'mlp.c_fc.weight']))


def test_composition_as_in_the_paper():
    taus = [model(seed=s) for s in range(3)]
    boosted = subspace_boosting(ties(taus))
    out = lines(boosted, taus, slope=.3)
    l1 = lambda t: sum(v.abs().sum().item() for v in t.values())
    start = l1(task_arithmetic(taus))/l1(boosted)/3
    k = 'visual.transformer.resblocks.{}.mlp.c_fc.weight'
    assert torch.allclose(out[k.format(0)], start*boosted[k.format(0)], rtol=1e-4)
    assert torch.allclose(out[k.format(1)], (start+.3)*boosted[k.format(1)], rtol=1e-4)


@fast
@given(st.one_of(st.floats(max_value=-1e-9), st.floats(min_value=1+1e-9), st.just(float('nan'))))
def test_refuses_shares(beta):
    for call in (lambda: boost(randn(3, 3), beta), lambda: subspace_boosting(model(), beta)):
        with pytest.raises(ValueError, match='beta'): call()
    with pytest.raises(ValueError, match='attention_beta'): subspace_boosting(model(), attention_beta=beta)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_refuses_non_finite(bad):
    with pytest.raises(ValueError, match='dw'): boost(torch.tensor([[1., bad]]))
    tau = model(); key = 'visual.transformer.resblocks.0.mlp.c_fc.weight'
    with pytest.raises(ValueError, match='c_fc'): subspace_boosting(tau.map(lambda k, v: v*bad if k==key else v))


@pytest.mark.parametrize('call, error, match', [
    (lambda: boost([[1.]]), TypeError, 'dw'), (lambda: boost(torch.ones(3)), ValueError, 'dw'), (lambda: boost(torch.ones(0, 3)), ValueError, 'dw'),
    (lambda: boost(torch.ones(2, 2, dtype=torch.int32)), TypeError, 'int32'), (lambda: boost(torch.ones(2, 2), rank_tol=-1), ValueError, 'rank_tol'),
    (lambda: subspace_boosting({'w': torch.ones(2, 2)}), TypeError, 'tau'), (lambda: subspace_boosting(model(), attention='per_layer'), ValueError, 'attention'),
    (lambda: subspace_boosting(model(), attention='per_head', head_width=63), ValueError, 'head_width')])
def test_refusals_name_the_parameter(call, error, match):
    with pytest.raises(error, match=match): call()
