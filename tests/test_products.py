"Spectra by products alone, the accuracy estimate, and work spread over cores."
import pytest, torch
from hypothesis import given, settings, strategies as st
from subspace_nb.spectra import check_matrix, check_rank_tol, gram_error, polar_iteration, spectral_norm, spread
from subspace_nb.tasks import check_attention, default_device, fused_names, join_rows, map_matrices, TaskVector


def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6))
def test_norm_and_polar_factor(m, n, seed):
    a = randn(3, m, n, seed=seed); u, s, vh = torch.linalg.svd(a, full_matrices=False)
    assert torch.allclose(spectral_norm(a), s[:, 0], rtol=1e-6)
    if (s[:, -1]>1e-4*s[:, 0]).all(): assert torch.allclose(polar_iteration(a), u@vh, atol=1e-8)


@pytest.mark.parametrize('kappa', [1e2, 1e4, 1e5, 1e6, 1e7])
def test_gram_error_is_no_underestimate(kappa):
    n = 80; q = torch.linalg.qr(randn(n, n))[0]; p = torch.linalg.qr(randn(n, n, seed=1))[0]
    s = torch.logspace(0, -torch.log10(torch.tensor(kappa)).item(), n, dtype=torch.float64); a = (q*s)@p.mT
    lam, v = torch.linalg.eigh(a.mT@a)
    rough = a@(v*lam.clamp_min(1e-300).rsqrt())@v.mT
    assert (rough-q@p.mT).norm()/n**.5 <= 3*gram_error(s, torch.ones(n, dtype=torch.float64))+1e-12


def test_spread_keeps_order_threads_and_errors():
    threads = torch.get_num_threads(); torch.set_num_threads(2)
    try:
        assert spread(lambda i: i*i, list(range(20)))==[i*i for i in range(20)] and torch.get_num_threads()==2
        with pytest.raises(ZeroDivisionError): spread(lambda i: 1/i, [1, 0, 1])
        assert torch.get_num_threads()==2
    finally: torch.set_num_threads(threads)


def test_checks():
    assert check_rank_tol(0)==0 and default_device().type in ('cpu', 'cuda') and 'in_proj_weight' in fused_names
    for bad in (-1, 1, float('nan')):
        with pytest.raises(ValueError, match='rank_tol'): check_rank_tol(bad)
    with pytest.raises(ValueError, match='attention'): check_attention('half', 64)
    with pytest.raises(ValueError, match='weights'): check_matrix(torch.ones(3), 'weights')


@pytest.mark.parametrize('attention', ['full_attn', 'per_qkv', 'per_head'])
def test_join_rows_is_the_inverse_of_cutting(attention):
    key = 'h.0.attn.in_proj_weight'; w = randn(3*128, 128)
    assert torch.equal(join_rows(map_matrices(lambda x: x, TaskVector({key: w}), attention=attention), key, w, attention), w)
