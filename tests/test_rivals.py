"TSV-M, Iso-C, Iso-CTS, KnOTS and RegMean: against their authors' conventions in float64, their invariances, and what they refuse."
import pytest, torch
from hypothesis import given, settings, strategies as st
from conftest import gap
from subspace_nb.merge import average, task_arithmetic, ties
from subspace_nb.rivals import (align, gram, input_gram, iso, iso_c, iso_cts, iso_cts_matrix, iso_sizes, knots, leading, noise_mask, polar_columns, regmean,
                                regmean_matrix, room_for, task_rank, top_eigen, tsv_m, tsv_matrix)
from subspace_nb.tasks import TaskVector, two_dim

fast = settings(max_examples=40, deadline=None)
dims = st.integers(1, 24)


def randn(*shape, seed=0, dtype=torch.float32): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def model(width=128, blocks=1, seed=0, dtype=torch.float32):
    "Names and shapes of an open_clip tower, small, with a decaying spectrum."
    rng = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width+1)**-.7
    shape = {'attn.in_proj_weight': (3*width, width), 'attn.in_proj_bias': (3*width,), 'attn.out_proj.weight': (width, width),
             'mlp.c_fc.weight': (4*width, width), 'mlp.c_proj.weight': (width, 4*width), 'ln_1.weight': (width,)}
    make = lambda s: torch.randn(s, generator=rng)*(1. if len(s)!=2 else scale if s[1]==width else scale[:, None] if s[0]==width else 1.)*1e-3
    d = {f'visual.transformer.resblocks.{b}.{n}': make(s).to(dtype) for b in range(blocks) for n, s in shape.items()}
    return TaskVector(d | {'visual.conv1.weight': make((width, 3, 4, 4)).to(dtype), 'visual.positional_embedding': make((50, width)).to(dtype),
                           'visual.proj': make((width, width//2)).to(dtype), 'text_projection': make((width//2, width//2)).to(dtype)})


# ---- the conventions, one plain SVD per matrix, in float64

def svd64(w): return torch.linalg.svd(w.double(), full_matrices=False)


def whiten(w): u, _, vh = svd64(w); return u@vh


def plain(taus, matrix):
    "2-D entries but the text projection through `matrix`, the mean of all others."
    return {k: matrix([t[k].double() for t in taus]) if w.ndim==2 and 'text_projection' not in k else sum(t[k].double() for t in taus)/len(taus) for k, w in taus[0].items()}


def plain_tsv(ws):
    r = min(ws[0].shape); k = int(r*(1/len(ws)))
    big_u, big_s, big_v = torch.zeros(ws[0].shape[0], r).double(), torch.zeros(r).double(), torch.zeros(r, ws[0].shape[1]).double()
    for i, w in enumerate(ws):
        u, s, vh = svd64(w); at = slice(i*k, (i+1)*k)
        big_u[:, at], big_s[at], big_v[at] = u[:, :k], s[:k], vh[:k]
    n = len(ws)*k
    return whiten(big_u[:, :n])@big_s[:n].diag()@whiten(big_v[:n])


def plain_iso(ws): u, s, vh = svd64(sum(ws)); return s.mean()*u@vh


def plain_cts(ws, common=.8):
    r, n = min(ws[0].shape), len(ws)
    tasks = round((r-int(r*common))/n)*n
    c, k = r-tasks, tasks//n
    u, s, vh = svd64(sum(ws))
    us, ss, vs = [], [], []
    for w in ws:
        a, b, d = svd64(w-u[:, :c]@u[:, :c].T@w)
        us.append(a[:, :k]), ss.append(b[:k]), vs.append(d[:k])
    us, ss, vs = torch.cat(us+[u[:, :c]], 1), torch.cat(ss+[s[:c]]), torch.cat(vs+[vh[:c]])
    return ss.mean()*whiten(us)@whiten(vs)


ours_and_plain = [(tsv_m, plain_tsv), (iso_c, plain_iso), (iso_cts, plain_cts)]


@pytest.mark.parametrize('n', [2, 3, 8])
@pytest.mark.parametrize('ours, matrix', ours_and_plain)
def test_agrees_with_the_authors_conventions(ours, matrix, n):
    taus = [model(seed=s) for s in range(n)]
    out, ref = ours(taus), plain(taus, matrix)
    assert list(out)==list(taus[0])
    for k in ref: assert gap(out[k], ref[k])<=5e-5, k


@pytest.mark.parametrize('ours, matrix', [(tsv_matrix, plain_tsv), (lambda d: iso(d.sum(0)), plain_iso), (iso_cts_matrix, plain_cts)])
@fast
@given(st.tuples(st.integers(2, 40), st.integers(2, 40)), st.integers(1, 5), st.integers(0, 10**6))
def test_matrices_of_any_shape(ours, matrix, shape, n, seed):
    if min(shape)<n: return
    dws = randn(n, *shape, seed=seed, dtype=torch.float64)
    s = torch.linalg.svdvals(dws.sum(0))
    if s[-1]<1e-3*s[0]: return                                # nearly singular: the result hangs on rounding
    assert gap(ours(dws), matrix(list(dws)))<=1e-4


@pytest.mark.parametrize('kappa', [1e2, 1e4, 1e6])
@pytest.mark.parametrize('ours, matrix', ours_and_plain)
def test_ill_conditioned(ours, matrix, kappa):
    d = torch.logspace(0, -torch.log10(torch.tensor(kappa)).item(), 96)
    taus = [TaskVector({'a': randn(96, 96, seed=s)*d, 'b': randn(160, 96, seed=10+s)*d, 'c': (randn(160, 96, seed=20+s)*d).mT.contiguous()}) for s in range(4)]
    out, ref = ours(taus), plain(taus, matrix)
    for k in ref: assert gap(out[k], ref[k])<=1e-4, k


@pytest.mark.parametrize('kind', ['power', 'steep', 'two steps'])
def test_at_sizes_where_only_leading_directions_are_computed(kind):
    d = {'power': torch.arange(1, 321)**-.7, 'steep': torch.logspace(0, -4, 320), 'two steps': torch.cat([torch.ones(10), .1*torch.ones(310)])}[kind]
    turn = torch.linalg.qr(randn(320, 320, seed=99))[0]
    make = lambda rows, seed: randn(rows, 320, seed=seed)*d@turn
    taus = [TaskVector({'a': make(320, s), 'b': make(640, 10+s)} if kind!='two steps' else {'c': make(640, 20+s).mT.contiguous()}) for s in range(8)]
    for f, matrix in ours_and_plain:
        out, ref = f(taus), plain(taus, matrix)
        for k in ref: assert gap(out[k], ref[k])<=(1e-3 if kind=='steep' else 1e-4), (f, k)     # steep: V side by side has condition 3e6


@pytest.mark.parametrize('k', [1, 20, 50])
def test_top_eigen(k):
    w = randn(500, 300, dtype=torch.float64)*torch.arange(1, 301)**-.7
    lam, v = top_eigen(gram(w), k)
    full, vecs = torch.linalg.eigh(gram(w))
    assert torch.allclose(lam, full[-k:].flip(0), rtol=1e-8)
    assert gap(vecs[:, -k:]@(vecs[:, -k:].mT@v), v)<1e-5
    assert torch.equal(lam, top_eigen(gram(w), k)[0])          # the same start each time


def test_top_eigen_gives_up():
    for g in (torch.eye(300).double(), torch.zeros(300, 300).double(), gram(randn(300, 5, dtype=torch.float64)@randn(5, 300, dtype=torch.float64)), torch.eye(100).double()):
        assert top_eigen(g, 20) is None
    u, s, v = leading(randn(400, 5)@randn(5, 300), 20)         # and a plain SVD finds the rank
    assert (s[:5]>1).all() and not s[5:].any() and not u[:, 5:].any() and not v[:, 5:].any()



def test_gram():
    for n in (3, 64, 130): a = randn(150, n, dtype=torch.float64); assert torch.allclose(gram(a), a.mT@a)


# ---- what they keep, what they share

def test_sizes():
    assert [task_rank(r, n) for r, n in ((768, 8), (768, 20), (50, 20), (17, 20))]==[96, 38, 2, 0]
    assert task_rank(49, 49)==int(49*(1/49))==0                # to the letter: 49·(1/49) is just below 1
    assert iso_sizes(768, 8)==(616, 19) and iso_sizes(768, 20)==(608, 8) and iso_sizes(768, 14)==(614, 11)
    assert iso_sizes(10, 4)==(10, 0) and iso_sizes(30, 4)==(22, 2)          # 0.5 goes to 0 and 1.5 to 2: half to even
    assert iso_sizes(50, 20)==(50, 0)
    for r in range(1, 200):
        for n in range(1, 21):
            c, k = iso_sizes(r, n)
            assert c+n*k==r and c>=0


def test_one_expert():
    tau = model()
    for k, w in tsv_m([tau]).items(): assert gap(w, tau[k])<1e-5, k          # nothing to merge, nothing lost
    a, b = iso_c([tau]), iso_cts([tau])
    for k in tau: assert gap(a[k], b[k])<1e-4, k                # all directions are the expert's own


def test_orthogonal_experts_are_kept_whole():
    q, p = torch.linalg.qr(randn(40, 40))[0], torch.linalg.qr(randn(30, 30, seed=1))[0]
    dws = torch.stack([q[:, 10*i:10*i+10]@torch.diag(torch.linspace(2, 1, 10)*(i+1))@p[:, 10*i:10*i+10].mT for i in range(3)])
    assert gap(tsv_matrix(dws), dws.sum(0))<1e-5


def test_flat_spectra():
    taus = [model(seed=s) for s in range(3)]
    key = 'visual.transformer.resblocks.0.mlp.c_fc.weight'
    for f in (iso_c, iso_cts):
        s = torch.linalg.svdvals(f(taus)[key])
        assert torch.allclose(s, s.mean().expand_as(s), rtol=1e-4)


@pytest.mark.parametrize('f', [tsv_matrix, iso_cts_matrix])
def test_batch_equals_loop(f):
    dws = randn(3, 2, 4, 20, 12)
    out = f(dws)
    assert out.shape==(2, 4, 20, 12)
    for i in range(2):
        for j in range(4): assert torch.allclose(out[i, j], f(dws[:, i, j]), atol=1e-5)


@fast
@given(st.integers(0, 1000), st.floats(1e-4, 1e4))
def test_invariances(seed, scale):
    dws = randn(3, 18, 12, seed=seed, dtype=torch.float64)
    if torch.linalg.svdvals(dws.sum(0))[-1]<1e-2: return
    q, p = (torch.linalg.qr(randn(m, m, seed=seed+1, dtype=torch.float64))[0] for m in (18, 12))
    for f in (tsv_matrix, iso_cts_matrix, lambda d: iso(d.sum(0))):
        out = f(dws)
        assert gap(f(scale*dws), scale*out)<1e-4
        assert gap(f(q@dws@p), q@out@p)<1e-4
        assert gap(f(dws[[2, 0, 1]]), out)<1e-4                # the order of the experts does not matter
    assert gap(tsv_matrix(dws.mT), tsv_matrix(dws).mT)<1e-4
    u, coords = align(dws)
    assert gap(u@coords, dws)<1e-10 and gap(u.mT@u, torch.eye(u.shape[1]))<1e-10


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('f', [tsv_m, iso_c, iso_cts, knots])
def test_dtype_comes_back(f, dtype):
    taus = [model(32, seed=s, dtype=dtype) for s in range(3)]
    out = f(taus)
    ref = f([t.to(torch.float64) for t in taus])
    assert all(v.dtype==dtype and v.shape==taus[0][k].shape for k, v in out.items())
    coarse = {torch.float16: 5e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-4)     # the work itself is done in float32 or better
    if f is not knots:
        for k in out: assert gap(out[k], ref[k])<coarse, k


def test_select_and_rest():
    taus = [model(32, seed=s) for s in range(3)]
    mean = average(taus)
    for f in (tsv_m, iso_c, iso_cts):
        changed = {k for k, v in f(taus).items() if gap(v, mean[k])>1e-5}
        assert changed=={k for k, w in taus[0].items() if two_dim(k, w)}
        assert all(gap(v, mean[k])<1e-6 for k, v in f(taus, select=lambda k, w: False).items())


@pytest.mark.parametrize('f', [tsv_m, iso_c, iso_cts])
def test_inputs_stay_as_they_were(f):
    taus = [model(32, seed=s) for s in range(2)]; copies = [t.map(lambda k, v: v.clone()) for t in taus]
    f(taus)
    assert all(torch.equal(t[k], c[k]) for t, c in zip(taus, copies) for k in t)


# ---- directions that mean nothing

def test_low_rank_experts():
    lora = [TaskVector({'w': randn(60, 2, seed=s)@randn(2, 40, seed=9+s)}) for s in range(3)]
    dws = torch.stack([t['w'] for t in lora])
    moved = [TaskVector({'w': t['w']+1e-7*t['w'].std()*randn(60, 40, seed=50+s)}) for s, t in enumerate(lora)]
    for f in (tsv_m, iso_c, iso_cts):
        s = torch.linalg.svdvals(f(lora)['w'])
        assert (s[6:]<1e-4*s[0]).all(), f                      # nothing is made up outside the experts' span
    assert gap(tsv_matrix(dws), tsv_matrix(dws, k=2))<1e-4     # k = 13 asked for, rank 2 found
    assert gap(tsv_m(moved)['w'], tsv_m(lora)['w'])<1e-3       # and rounding noise does not become a direction


def test_zero_and_silent_experts():
    w = randn(12, 8)
    for f in (tsv_matrix, iso_cts_matrix): assert torch.equal(f(torch.zeros(3, 12, 8)), torch.zeros(12, 8))
    assert gap(tsv_matrix(torch.stack([w, torch.zeros_like(w)])), tsv_matrix(w[None], k=4))<1e-5     # a silent expert adds nothing
    assert not polar_columns(torch.zeros(5, 2).double(), torch.ones(2).double())[0].any()


@fast
@given(dims, dims, st.integers(0, 1000))
def test_leading(rows, cols, seed):
    w = randn(rows, cols, seed=seed)
    r = min(rows, cols); k = 1+seed%r
    u, s, v = leading(w, k)
    a, b, c = svd64(w)
    assert u.shape==(rows, k) and v.shape==(cols, k)
    assert torch.allclose(s, b[:k], rtol=1e-6, atol=1e-8*b[0].item())
    if k==r or b[k]<.98*b[k-1]: assert gap((u*s)@v.mT, (a[:, :k]*b[:k])@c[:k])<1e-5


# ---- KnOTS

def test_knots_by_its_definition():
    taus = [model(24, seed=s).map(lambda k, v: 100*v) for s in range(3)]
    seen = []
    out = knots(taus, merge=lambda ts: seen.extend(ts) or ties(ts))
    key = 'visual.transformer.resblocks.0.mlp.c_fc.weight'
    u, s, vh = svd64(torch.cat([t[key] for t in taus], 1))
    keep = s>1e-5
    ref = (s[:, None]*vh)[keep].reshape(keep.sum(), 3, -1)
    for i, t in enumerate(seen): assert torch.allclose(t[key].double().abs(), ref[:, i].abs(), atol=1e-4)     # up to a row's sign
    assert gap(out[key], u[:, keep]@(torch.sign((ref[:, 0]*seen[0][key]).sum(1))[:, None]*ties(seen)[key].double()))<1e-4
    for k in out:
        if not two_dim(k, out[k]): assert torch.equal(out[k], ties(seen)[k])


@pytest.mark.parametrize('linear', [task_arithmetic, average])
def test_knots_of_a_linear_merge(linear):
    taus = [model(24, seed=s) for s in range(3)]
    out, ref = knots(taus, linear, cut=0.), linear(taus)
    for k in ref: assert gap(out[k], ref[k])<1e-5, k


def test_knots_cut():
    u, coords = align(torch.stack([torch.diag(torch.tensor([1., 1e-3, 1e-6])), torch.zeros(3, 3)]))
    assert u.shape==(3, 2) and coords.shape==(2, 2, 3)
    assert align(1e-7*randn(2, 4, 3))[0].shape==(4, 0)
    assert align(randn(2, 40, 3))[0].shape==(40, 6)            # taller than all experts side by side


# ---- RegMean

def proxies(n, taus, seed=0, rows=None):
    return [{k: randn(rows or 2*w.shape[1], w.shape[1], seed=97*i+j+seed) for j, (k, w) in enumerate(taus[0].items()) if two_dim(k, w)} for i in range(n)]


def test_regmean_by_its_definition():
    taus = [model(16, seed=s) for s in range(3)]
    xs = proxies(3, taus)
    base = {k: randn(*w.shape, seed=77) for k, w in taus[0].items()}
    out = regmean(taus, xs)
    for k, w in out.items():
        if k not in xs[0]: assert gap(w, average(taus)[k])<1e-6; continue
        gs = [x[k].double().mT@x[k].double()/len(x[k]) for x in xs]
        gs = [torch.where(torch.eye(len(g)).bool(), g, .95*g) for g in gs]
        whole = torch.linalg.solve(sum(gs), sum(g@(base[k].double()+t[k].double()).mT for g, t in zip(gs, taus))).mT     # on W, as in the paper
        assert gap(w, whole-base[k])<1e-4, k


@fast
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40), st.integers(0, 1000))
def test_regmean_is_the_minimum(out, width, rows, seed):
    dws, xs = randn(3, out, width, seed=seed, dtype=torch.float64), [randn(rows, width, seed=seed+i, dtype=torch.float64) for i in range(3)]
    w = regmean_matrix(dws, (input_gram(x, 1.) for x in xs))
    loss = lambda v: sum(((x@(v-d).mT)**2).sum().item()/len(x) for x, d in zip(xs, dws))
    best = loss(w)
    for scale in (1e-3, 1e-1): assert best<=loss(w+scale*randn(out, width, seed=seed+5))*(1+1e-9)+1e-12


def test_regmean_limits():
    dws = randn(3, 5, 4, dtype=torch.float64)
    assert gap(regmean_matrix(dws, [torch.eye(4).double()]*3), dws.mean(0))<1e-12          # equal inputs: the mean
    assert gap(regmean_matrix(dws, [torch.zeros(4, 4).double()]*3), dws.mean(0))<1e-12     # no inputs: the mean
    one = regmean_matrix(dws, [torch.eye(4).double(), *[torch.zeros(4, 4).double()]*2])
    assert gap(one, dws[0])<1e-12                              # where only one expert has inputs, it decides
    dead = [torch.diag(torch.tensor([1., 1., 0., 0.])).double()]*3
    assert gap(regmean_matrix(dws, dead), dws.mean(0))<1e-12


def test_input_gram():
    x = randn(9, 4)
    g = input_gram(x)
    assert torch.allclose(g.diag(), (x.double()**2).mean(0)) and torch.allclose(g[0, 1], .95*(x[:, 0].double()*x[:, 1].double()).mean())
    assert torch.equal(input_gram(x, 0.), g.diag().diag())


# ---- refusals

@pytest.mark.parametrize('f', [tsv_m, iso_c, iso_cts, knots])
def test_refuses_what_cannot_be_merged(f):
    taus = [model(16, seed=s) for s in range(2)]
    key = 'visual.transformer.resblocks.0.mlp.c_fc.weight'
    for bad, error, match in (([], ValueError, 'taus'), (taus[0], TypeError, 'taus'), ([taus[0], taus[0]], ValueError, 'same expert'),
                              ([taus[0], model(8)], ValueError, 'c_fc'), ([taus[0], taus[1].map(lambda k, v: v*float('nan') if k==key else v)], ValueError, 'c_fc')):
        with pytest.raises(error, match=match): f(bad)


def test_more_experts_than_singular_values():
    taus = [TaskVector({'small.weight': randn(3, 8, seed=s), 'large.weight': randn(9, 8, seed=50+s)}) for s in range(4)]
    with pytest.raises(ValueError, match='small.weight.*k = 0'): tsv_m(taus)
    out = tsv_m(taus, select=room_for(4))
    assert gap(out['small.weight'], average(taus)['small.weight'])<1e-6 and gap(out['large.weight'], average(taus)['large.weight'])>.1
    assert iso_cts(taus)['small.weight'].shape==(3, 8)         # here a matrix without room is all common
    with pytest.raises(ValueError, match='large.weight'): iso_cts([TaskVector({'large.weight': randn(9, 6, seed=s)}) for s in range(5)]+
                                                                  [TaskVector({'large.weight': randn(9, 6, seed=s)}) for s in range(5, 10)], common=0.)


@pytest.mark.parametrize('call, error, match', [
    (lambda: tsv_matrix(torch.zeros(4, 3)), ValueError, 'dws'), (lambda: tsv_matrix([randn(4, 3)]), TypeError, 'dws'),
    (lambda: tsv_matrix(randn(2, 4, 3), k=0), ValueError, 'k must'), (lambda: tsv_matrix(randn(2, 4, 3), k=4), ValueError, 'k must'),
    (lambda: tsv_matrix(randn(2, 4, 3), k=1.), TypeError, 'k must'), (lambda: tsv_matrix(randn(5, 4, 3)), ValueError, 'k = 0'),
    (lambda: tsv_matrix(randn(2, 4, 3)*float('inf')), ValueError, 'dws'), (lambda: tsv_matrix(torch.zeros(0, 4, 3)), ValueError, 'dws'),
    (lambda: iso_cts_matrix(randn(2, 4, 3), 1.5), ValueError, 'common'), (lambda: iso_cts_matrix(randn(2, 4, 3), -1), ValueError, 'common'),
    (lambda: iso_cts([model(8), model(8, seed=1)], common=2), ValueError, 'common'), (lambda: iso(torch.ones(2, 2, dtype=torch.int64)), TypeError, 'dw'),
    (lambda: knots([model(8)]), ValueError, 'at least 2')])
def test_refusals_name_the_parameter(call, error, match):
    with pytest.raises(error, match=match): call()


def test_regmean_refusals():
    taus = [model(8, seed=s) for s in range(2)]
    xs = proxies(2, taus)
    key = 'visual.transformer.resblocks.0.mlp.c_proj.weight'
    swap = lambda new: [xs[0], {**xs[1], key: new}]
    without = [xs[0], {k: v for k, v in xs[1].items() if k!=key}]
    for bad, error, match in ((swap(randn(5, 7)), ValueError, 'c_proj'), (swap(randn(5)), ValueError, 'c_proj'), (swap(randn(0, 32)), ValueError, 'c_proj'),
                              (swap(randn(5, 32)*float('nan')), ValueError, 'c_proj'), (swap(None), ValueError, 'c_proj'), (without, ValueError, 'c_proj.*missing'),
                              (xs[:1], ValueError, 'inputs'), (xs[0], TypeError, 'inputs'), ([xs[0], None], TypeError, r'inputs\[1\]'),
                              ([{'head': randn(3, 3)}]*2, ValueError, 'head'), ([{'visual.conv1.weight': randn(3, 3)}]*2, ValueError, 'conv1')):
        with pytest.raises(error, match=match): regmean(taus, bad)
    for share in (-.1, 1.1, float('nan')):
        with pytest.raises(ValueError, match='off_diagonal'): regmean(taus, xs, off_diagonal=share)


def test_noise_mask():
    eps = torch.finfo(torch.float32).eps
    lora = torch.linalg.svdvals((randn(300, 8)@randn(8, 200)).double())
    assert noise_mask(lora, (300, 200), eps).tolist()==[False]*8+[True]*192
    smooth = torch.logspace(0, -9, 200).double()
    assert not noise_mask(smooth, (200, 200), eps).any()       # no cliff, no rank
    small = torch.cat([torch.ones(199), torch.tensor([1e-6])]).double()
    assert not noise_mask(small, (200, 200), eps).any()        # one small value is no noise
    assert noise_mask(torch.zeros(4).double(), (4, 4), eps).all()
    assert noise_mask(1e-8*torch.rand(5).double().sort(descending=True)[0], (9, 5), eps, part_of=1.).all()
