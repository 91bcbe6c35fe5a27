"Invariances of the rank measures over whole models, oracles for the fits, and refusals."
import numpy as np
import pytest
import torch
from functools import partial
from hypothesis import given, settings, strategies as st
from subspace_nb.collapse import component, cosines, growth, growth_exponent, mean_cosine, normalised, rank_table, spectrum_growth
from subspace_nb.spectra import energy_rank, stable_rank
from subspace_nb.tasks import TaskVector


def model(seed, blocks=2, width=8):
    g = torch.Generator().manual_seed(seed)
    shapes = {'attn.in_proj_weight': (3*width, width), 'attn.out_proj.weight': (width, width), 'mlp.c_fc.weight': (4*width, width), 'mlp.c_proj.weight': (width, 4*width), 'ln_1.weight': (width,)}
    return TaskVector({f'visual.transformer.resblocks.{b}.{k}': torch.randn(s, generator=g) for b in range(blocks) for k, s in shapes.items()})

taus = [model(i) for i in range(6)]


@pytest.mark.parametrize('name, want', [
    ('visual.transformer.resblocks.3.attn.in_proj_weight', 'attn.in_proj'), ('visual.transformer.resblocks.3.attn.in_proj_weight[q2]', 'attn.in_proj[q2]'),
    ('resblocks.0.mlp.c_fc.weight', 'mlp.c_fc'), ('vision_model.encoder.layers.10.self_attn.q_proj.weight', 'self_attn.q_proj'),
    ('encoder.layer.1.attention.output.dense.weight', 'attention.output.dense'), ('visual.proj', 'visual.proj')])
def test_component(name, want): assert component(name)==want


def test_rank_table_has_a_row_per_matrix():
    t = rank_table(taus[0])
    assert list(t.columns)==['block', 'component', 'value'] and len(t)==8
    for b, part, value in t.itertuples(index=False):
        key = next(k for k in taus[0] if f'.{b}.' in k and component(k)==part)
        assert value==pytest.approx(stable_rank(taus[0][key]).item(), rel=1e-5)


def test_rank_table_cuts_attention():
    parts = set(rank_table(taus[0], attention='per_qkv').component)
    assert {'attn.in_proj[q]', 'attn.in_proj[k]', 'attn.in_proj[v]'} < parts
    assert len(rank_table(taus[0], attention='per_head', head_width=4))==2*(6+3)


@given(st.floats(1e-3, 1e3))
@settings(max_examples=15, deadline=None)
def test_ranks_ignore_scale(c):
    assert np.allclose(rank_table(taus[0]*c).value, rank_table(taus[0]).value, rtol=1e-4)
    assert (rank_table(taus[0]*c, energy_rank).value==rank_table(taus[0], energy_rank).value).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_ranks_in_other_precisions(dtype):
    assert np.allclose(rank_table(taus[0].to(dtype)).value, rank_table(taus[0]).value, rtol=.02)


def test_growth_agrees_with_single_tables():
    g = growth(taus, (1, 3, 6))
    assert (g[g.N==1].value.values==rank_table(taus[0]).value.values).all() and np.allclose(g[g.N==1].share, 1)
    assert np.allclose(g[g.N==3].value, rank_table(sum(taus[:3])).value)
    assert np.allclose(g[g.N==6].span, sum(rank_table(t).value for t in taus))


def test_growth_does_not_depend_on_the_order_within_the_last_count():
    a, b = growth(taus, (6,)), growth(taus[::-1], (6,))
    assert np.allclose(a.value, b.value, rtol=1e-4) and np.allclose(a.span, b.span, rtol=1e-4)


def test_growth_takes_other_merges_and_measures():
    mean = growth(taus, (2, 4), merge=lambda ts: sum(ts)/len(ts))
    assert np.allclose(mean.value, growth(taus, (2, 4)).value, rtol=1e-4)       # ranks ignore scale
    assert (growth(taus, (4,), partial(energy_rank, share=.3)).value <= growth(taus, (4,), energy_rank).value).all()


def test_normalised():
    g = normalised(growth(taus, (2, 4, 6)))
    assert (g.groupby(['block', 'component']).relative.max()==1).all()
    whole = normalised(growth(taus, (2, 4)), by=('component',))
    assert (whole.groupby('component').relative.max()==1).all() and (whole.relative<=1).all()


@pytest.mark.parametrize('counts', [(), (0, 2), (2, 7), (4, 2), (2, 2), (1.5,), ('2',)])
def test_counts_are_checked(counts):
    with pytest.raises(ValueError, match='counts'): growth(taus, counts)
    with pytest.raises(ValueError, match='counts'): spectrum_growth(taus, counts)


def test_refusals():
    nan = model(9).map(lambda k, v: v*float('nan'))
    for fn in (growth, spectrum_growth):
        with pytest.raises(ValueError, match='no experts'): fn([])
        with pytest.raises(ValueError, match='NaN'): fn([taus[0], nan], (1, 2))
        with pytest.raises(ValueError, match='same expert'): fn([taus[0], model(0)], (1, 2))
        with pytest.raises(TypeError, match='taus'): fn(taus[0])
    with pytest.raises(ValueError, match='select'): spectrum_growth([TaskVector({'h.0.a': torch.ones(2, 3), 'h.0.b': torch.ones(5, 4)})], (1,))
    with pytest.raises(ValueError, match='tau'): rank_table(taus[0], select=lambda k, w: False)
    with pytest.raises(ValueError, match='at least 2'): cosines(taus[:1])


def test_spectra_of_identical_directions_grow_linearly():
    s = spectrum_growth([taus[0]*(1+i) for i in range(5)], (1, 2, 5))
    assert s.shape==(3, 8, 8)
    assert torch.allclose(s[1], 3*s[0], rtol=1e-4) and torch.allclose(s[2], 15*s[0], rtol=1e-4)


@given(st.floats(-2, 2), st.floats(.01, 100), st.lists(st.integers(1, 100), min_size=3, max_size=8, unique=True))
@settings(deadline=None)
def test_exponent_of_a_power_law(p, c, counts):
    slope, error = growth_exponent(counts, [c*n**p for n in counts])
    assert slope.item()==pytest.approx(p, abs=1e-6) and error.item()==pytest.approx(0, abs=1e-5)


def test_exponent_against_polyfit():
    rng = np.random.default_rng(0)
    x, y = np.array([2, 4, 8, 14, 20]), np.exp(rng.normal(size=(5, 3, 2)))
    slope, error = growth_exponent(x, y)
    assert slope.shape==error.shape==(3, 2)
    for i in range(3):
        for j in range(2):
            fit, cov = np.polyfit(np.log(x), np.log(y[:, i, j]), 1, cov=True)
            assert slope[i, j].item()==pytest.approx(fit[0]) and error[i, j].item()==pytest.approx(cov[0, 0]**.5)


@pytest.mark.parametrize('counts, values, name', [([1, 2], [1., 2.], 'counts'), ([1, 2, 2], [1., 2., 3.], 'counts'), ([0, 1, 2], [1., 2., 3.], 'counts'), ([[1, 2, 3]], [1.], 'counts'),
                                                  ([1, 2, 3], [1., 2.], 'values'), ([1, 2, 3], [1., 0., 2.], 'values'), ([1, 2, 3], [1., float('nan'), 2.], 'values')])
def test_exponent_refusals(counts, values, name):
    with pytest.raises(ValueError, match=name): growth_exponent(counts, values)


def test_cosines_against_flat_vectors():
    only = [t.map(lambda k, v: v if v.ndim==2 else torch.zeros_like(v)).flat() for t in taus]
    c = cosines(taus)
    assert c.shape==(6, 6) and torch.allclose(c.diag(), torch.ones(6, dtype=c.dtype))
    for i in range(6):
        for j in range(6): assert c[i, j].item()==pytest.approx(torch.cosine_similarity(only[i], only[j], dim=0).item(), abs=1e-5)
    assert mean_cosine(taus)==pytest.approx((c.sum().item()-6)/30)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_same_on_gpu():
    a, b = growth(taus, (2, 6), device='cuda'), growth(taus, (2, 6), device='cpu')
    assert np.allclose(a.value, b.value, rtol=1e-4)
