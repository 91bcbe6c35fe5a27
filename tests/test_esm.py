"Essential Subspace Merging: against the conventions written out in float64, its invariances, its routed extension, what it refuses."
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from conftest import gap
from subspace_nb.esm import (Residual, RoutedAttention, RoutedLinear, RoutedModel, Router, Steps, apply_esm, check_variant, esd_keys, esm, essential_factors,
                             layer_factors, merge_matrix, polar_times, residuals, routed, routed_keys, variants)
from subspace_nb.essential import Moments, essential_subspace, second_moment
from subspace_nb.experts import import_open_clip
from subspace_nb.rivals import room_for, tsv_m
from subspace_nb.tasks import TaskVector, task_vector, two_dim

plain = dict(task=False, weight=0., dimension=False, layer=False)
flags = {'released': {}, 'cvpr': dict(weight=0.), 'cvpr_kept': dict(weight=0., norm='kept'), 'esd': plain, 'task': plain | dict(task=True),
         'dimension': plain | dict(dimension=True), 'layer': plain | dict(layer=True), 'svd': dict(basis='weights'), 'svd_plain': plain | dict(basis='weights')}
block = 'visual.transformer.resblocks.{}.'


# ---- the released conventions, step by step in float64, one SVD for each decomposition

def relative(v): return v/v.mean()

def svd_polar(m):
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u@vh, s.mean()

def full_basis(shift):
    "All principal directions as columns, unit vectors where there are fewer than outputs, and the energies."
    _, s, vh = torch.linalg.svd(shift, full_matrices=False)
    e, lam = torch.eye(shift.shape[1], dtype=shift.dtype), torch.zeros(shift.shape[1], dtype=shift.dtype)
    e[:, :len(s)], lam[:len(s)] = vh.mT, s**2/(len(shift)-1)
    return e, lam

def reference_matrix(dws, xs, basis='shift', task=True, norm='full', weight=.15, dimension=True, layer=None):
    n, out = len(dws), len(dws[0])
    k, es, coords, norms = int(out*(1/n)), [], [], []
    for dw, x in zip(dws, xs):
        dw, x = dw.double(), x.double()
        if basis=='shift': e, lam = full_basis(x@dw.mT); a = e.mT@dw
        else:
            e, s, vh = torch.linalg.svd(dw, full_matrices=False)
            a, lam = s[:, None]*vh, s**2
        norms.append(a.norm() if norm=='full' else a[:k].norm())
        w = relative((lam[:k]/lam[:k].mean())**weight)
        es.append(e[:, :k]*w); coords.append(a[:k]*w[:, None])
    if task: coords = [a*r**2 for a, r in zip(coords, relative(torch.stack(norms)))]
    p, a = torch.cat(es, 1), torch.cat(coords)
    if dimension: a = a*relative(a.norm(dim=0))**2
    (up, mean_p), (ua, mean_a) = svd_polar(p), svd_polar(a)
    return 2*mean_p*mean_a*up@ua

def reference_tsv(dws):
    k = int(min(dws[0].shape)*(1/len(dws)))
    us, ss, vhs = zip(*(torch.linalg.svd(d, full_matrices=False) for d in dws))
    return svd_polar(torch.cat([u[:, :k] for u in us], 1))[0]@torch.diag(torch.cat([s[:k] for s in ss]))@svd_polar(torch.cat([v[:k] for v in vhs]))[0]

def reference(taus, inputs, layer=True, **steps):
    new = {}
    for k, w in taus[0].items():
        dws = [t[k].double() for t in taus]
        if k in inputs[0]: new[k] = reference_matrix(dws, [x[k] for x in inputs], **steps)
        elif w.ndim==2 and 'text_projection' not in k: new[k] = reference_tsv(dws)
        else: new[k] = sum(dws)/len(dws)
    for kind in ('attn.in_proj_weight', 'attn.out_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight') if layer else ():
        keys = [k for k in new if kind in k]
        for k, f in zip(keys, relative(torch.stack([new[k].norm() for k in keys])) if keys else []): new[k] = new[k]*f**2
    return new


# ---- task vectors of open_clip's names

def shapes_of(width=24, blocks=2):
    one = {'attn.in_proj_weight': (3*width, width), 'attn.in_proj_bias': (3*width,), 'attn.out_proj.weight': (width, width), 'ln_1.weight': (width,),
           'mlp.c_fc.weight': (4*width, width), 'mlp.c_proj.weight': (width, 4*width)}
    rest = {'visual.conv1.weight': (width, 3, 2, 2), 'visual.proj': (width, 16), 'visual.positional_embedding': (17, width), 'text_projection': (width, 16), 'logit_scale': ()}
    return {block.format(b)+k: s for b in range(blocks) for k, s in one.items()} | rest

def make(n, width=24, blocks=2, rows=120, seed=0, dtype=torch.float32):
    "n full-rank task vectors with decaying spectra and their layers' inputs."
    rng = torch.Generator().manual_seed(seed)
    def tensor(s):
        w = torch.randn(s, generator=rng, dtype=torch.float64)
        return w*torch.linspace(1, .05, s[-1], dtype=torch.float64) if len(s)==2 else w
    shapes = shapes_of(width, blocks)
    taus = [TaskVector({k: ((1+.3*i)*tensor(s)).to(dtype) for k, s in shapes.items()}) for i in range(n)]
    names = [k for k in shapes if k.endswith(('in_proj_weight', 'c_fc.weight', 'c_proj.weight'))]
    inputs = [{k: (tensor((rows, shapes[k][1]))+.3).to(torch.float32 if dtype!=torch.float64 else dtype) for k in names} for _ in range(n)]
    return taus, inputs

def worst(out, ref): return max(gap(out[k], ref[k]) for k in ref)


@pytest.mark.parametrize('variant', variants)
@pytest.mark.parametrize('n', [1, 4, 5, 8])
def test_equals_the_conventions(variant, n):
    taus, inputs = make(n)
    ref = reference(taus, inputs, **flags[variant])
    # a single expert keeps 3d directions of a rank-d shift: the rest are no directions at all, and only there the default differs
    if n==1: ref = {k: v for k, v in ref.items() if not k.endswith(('in_proj_weight', 'c_fc.weight'))}
    out = esm(taus, inputs, variant) if n>1 or not variants[variant].layer else None
    if out is not None: assert worst(out, ref)<=1e-5


@pytest.mark.parametrize('rows', [3, 20, 60, 80, 150])
def test_few_rows(rows): # fewer rows than inputs, than outputs, than both: the released norm counts unit vectors then
    taus, inputs = make(8, rows=rows)
    keep = [k for k in inputs[0] if rows>=int(len(taus[0][k])/8)]               # with fewer rows than k the released basis is arbitrary
    inputs = [{k: x[k] for k in keep} for x in inputs]
    ref = reference(taus, inputs)
    assert worst(esm(taus, inputs), ref)<=1e-5
    assert worst(esm(taus, [{k: second_moment(v) for k, v in x.items()} for x in inputs]), ref)<=1e-5


def test_open_clip_width():
    shapes = {block.format(0)+k: s for k, s in {'attn.in_proj_weight': (576, 192), 'mlp.c_proj.weight': (192, 768)}.items()}
    rng = torch.Generator().manual_seed(1)
    taus = [TaskVector({k: torch.randn(s, generator=rng) for k, s in shapes.items()}) for _ in range(8)]
    inputs = [{k: torch.randn(400, s[1], generator=rng) for k, s in shapes.items()} for _ in range(8)]
    assert worst(esm(taus, inputs), reference(taus, inputs))<=1e-4


@pytest.mark.parametrize('variant', ['released', 'esd', 'svd'])
def test_moments_do_as_well_as_rows(variant):
    taus, inputs = make(5, rows=130)
    moments = [{k: second_moment(v) for k, v in x.items()} for x in inputs]
    assert worst(esm(taus, moments, variant), esm(taus, inputs, variant))<=1e-5


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 6), st.integers(8, 30), st.integers(0, 999), st.sampled_from(list(variants)))
def test_any_shape(n, k, width, rows, seed, variant):
    rng = torch.Generator().manual_seed(seed)
    dws = [torch.randn(n*k, n*k+width, generator=rng, dtype=torch.float64) for _ in range(n)]
    xs = [torch.randn(rows+n*k, n*k+width, generator=rng, dtype=torch.float64) for _ in range(n)]
    steps = {k: v for k, v in flags[variant].items() if k!='layer'}
    ref = reference_matrix(dws, xs, **steps)
    out = merge_matrix(dws, xs, variant)
    s = torch.linalg.svdvals(out)
    assert gap(out, ref)<=1e-6
    assert torch.allclose(s, s[:1].expand_as(s), rtol=1e-6)                   # one repeated singular value


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(2, 30), st.integers(0, 999))
def test_factors_are_the_essential_subspace(out, width, rows, seed):
    rng = torch.Generator().manual_seed(seed)
    dw, x = torch.randn(out, width, generator=rng, dtype=torch.float64), torch.randn(rows, width, generator=rng, dtype=torch.float64)
    k = max(1, min(out, width, rows)//2)
    basis, coords, energy, norm = essential_factors(dw, x, k)
    b, c, e = essential_subspace(dw, x, k)
    assert torch.allclose(energy, e, rtol=1e-8)
    if energy[-1]>1e-6*energy[0] and (energy[:-1]/energy[1:]).min()>1.001 if k>1 else True: assert gap(basis@coords, b@c)<=1e-6
    assert gap(norm, (full_basis(x@dw.mT)[0].mT@dw).norm())<=1e-9 or (rows<out and rows>width)


def test_white_inputs_give_the_svd():
    dw = torch.randn(12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(dw)
    basis, coords, energy, norm = essential_factors(dw, None, 4)
    assert gap(basis@coords, u[:, :4]*s[:4]@vh[:4])<=1e-10 and gap(energy/energy[0], (s[:4]/s[0])**2)<=1e-10 and gap(norm, dw.norm())<=1e-12


# ---- invariances

def test_order_of_experts_does_not_matter():
    taus, inputs = make(5)
    assert worst(esm(taus[::-1], inputs[::-1]), esm(taus, inputs))<=1e-5


def test_scale_of_inputs_does_not_matter(): # energies are relative, bases have no length
    taus, inputs = make(5)
    scaled = [{k: 1000*v for k, v in x.items()} for x in inputs]
    assert worst(esm(taus, scaled), esm(taus, inputs))<=1e-5


def test_homogeneous():
    taus, inputs = make(5)
    assert worst(esm([3*t for t in taus], inputs), 3*esm(taus, inputs))<=1e-5


def test_rotated_outputs():
    taus, inputs = make(5, rows=200)
    k = block.format(0)+'mlp.c_proj.weight'
    q = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(3)))[0]
    one = lambda rot: merge_matrix([rot@t[k] for t in taus], [x[k] for x in inputs])
    assert gap(one(q), q@one(torch.eye(24)))<=1e-4


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_comes_back(dtype):
    taus, inputs = make(5, dtype=dtype)
    out = esm(taus, inputs)
    assert all(v.dtype==dtype for v in out.values()) and list(out)==list(taus[0])
    ref = esm([t.to(torch.float64) for t in taus], inputs)
    assert worst(out, ref)<={torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]


def test_low_rank_experts_stay_finite_and_low_rank():
    rng = torch.Generator().manual_seed(0)
    k = block.format(0)+'mlp.c_fc.weight'
    lora = lambda: TaskVector({k: torch.randn(40, 2, generator=rng)@torch.randn(2, 12, generator=rng)})
    taus, inputs = [lora() for _ in range(4)], [{k: torch.randn(50, 12, generator=rng)} for _ in range(4)]
    out = esm(taus, inputs, 'esd')[k]
    s = torch.linalg.svdvals(out)
    assert out.isfinite().all() and (s[8:]<1e-5*s[0]).all()                    # 4 experts of rank 2
    noise = [TaskVector({k: t[k]+1e-7*torch.randn(40, 12, generator=rng)}) for t in taus]
    assert gap(esm(noise, inputs, 'esd')[k], out)<1e-3


def test_zero_expert_is_harmless():
    taus, inputs = make(4)
    taus[0] = 0*taus[0]
    assert all(v.isfinite().all() for v in esm(taus, inputs).values())


def test_layers_without_inputs_are_merged_by_tsv():
    taus, inputs = make(4)
    none = [{} for _ in taus]
    assert worst(esm(taus, none, 'esd'), tsv_m(taus))==0


def test_layer_factors():
    taus, _ = make(1, blocks=3)
    f = layer_factors({k: v for k, v in taus[0].items() if 'c_fc.weight' in k or 'out_proj.weight' in k})
    for kind in ('c_fc', 'out_proj'):
        norms = torch.stack([taus[0][k].norm() for k in f if kind in k])
        assert torch.allclose(torch.stack([f[k] for k in f if kind in k]), (norms/norms.mean())**2)


def test_alpha_multiplies_the_layers_with_inputs_only():
    taus, inputs = make(4)
    base = {k: torch.ones_like(v) for k, v in taus[0].items()} | {'visual.steps': torch.tensor(3)}
    merged, keys = esm(taus, inputs), esd_keys(taus, inputs)
    state = apply_esm(merged, base, .5, keys)
    assert sorted(keys)==sorted(inputs[0])
    for k, v in merged.items(): assert torch.allclose(state[k], 1+(.5 if k in keys else 1.)*v, atol=1e-6)
    assert state['visual.steps']==3
    with pytest.raises(ValueError, match='nothing'): apply_esm(merged, base, 1., ['nothing'])


def test_polar_times():
    rng = torch.Generator().manual_seed(0)
    for shape in ((9, 5), (5, 9), (7, 7)):
        m = torch.randn(shape, generator=rng, dtype=torch.float64)
        right = torch.randn(shape[1], 3, generator=rng, dtype=torch.float64)
        for tol in (1., 0.):                                                  # the Gram matrix, and the plain SVD
            u, mean = polar_times(m, None, tol)
            ref, s = svd_polar(m)
            assert gap(u, ref)<1e-9 and gap(mean, s)<1e-12 and gap(polar_times(m, right, tol)[0], ref@right)<1e-9
        m[:, 2] = 0; m[3] = 0
        u, mean = polar_times(m)
        assert not u[:, 2].any() and not u[3].any() and gap(mean, torch.linalg.svdvals(m).mean())<1e-9
        assert gap(polar_times(m, right)[0], u@right)<1e-12
    u, mean = polar_times(torch.zeros(3, 4, dtype=torch.float64))
    assert not u.any() and u.shape==(3, 4) and mean==0


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    taus, inputs = make(5)
    cuda = lambda t: t.to('cuda')
    out = esm([cuda(t) for t in taus], [{k: v.cuda() for k, v in x.items()} for x in inputs])
    assert all(v.is_cuda for v in out.values())
    assert worst({k: v.cpu() for k, v in out.items()}, esm(taus, inputs, device='cpu'))<=1e-4


# ---- ESM++

def tower(batch_first=True, seed=0):
    Transformer = import_open_clip().transformer.Transformer
    torch.manual_seed(seed)
    return Transformer(width=16, layers=2, heads=4, batch_first=batch_first).eval()

def tower_case(n=3, rows=40, seed=0):
    model = tower(seed=seed)
    rng = torch.Generator().manual_seed(seed)
    merged = {k: v.detach().clone() for k, v in model.named_parameters()}
    experts = [{k: v+.1*torch.randn(v.shape, generator=rng) for k, v in merged.items()} for _ in range(n)]
    inputs = [{k: torch.randn(rows, merged[k].shape[1], generator=rng)+2*torch.randn(merged[k].shape[1], generator=rng) for k in merged
               if k.endswith(('in_proj_weight', 'c_fc.weight', 'c_proj.weight'))} for _ in range(n)]
    return model, merged, experts, inputs

zero = lambda w: Residual(torch.zeros(3, w.shape[0], 2), torch.zeros(3, 2, w.shape[1]), torch.ones(3, w.shape[1]))


@pytest.mark.parametrize('batch_first', [True, False])
def test_zero_residuals_change_nothing(batch_first):
    model = tower(batch_first)
    keys = [k for k, v in model.named_parameters() if v.ndim==2 and 'out_proj' not in k]
    wrapped = RoutedModel(model, {k: zero(dict(model.named_parameters())[k]) for k in keys}).eval()
    x = torch.randn(5, 7, 16)
    mask = torch.full((7, 7), float('-inf')).triu(1)
    for m in (None, mask): assert torch.allclose(wrapped(x, attn_mask=m), model(x, attn_mask=m), atol=1e-5)


@pytest.mark.parametrize('batch_first', [True, False])
def test_attention_is_multihead_attention(batch_first):
    attn = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    wrapped = RoutedAttention(attn, Router(zero(attn.in_proj_weight), 1 if batch_first else 0)).eval()
    x = torch.randn(5, 7, 16) if batch_first else torch.randn(7, 5, 16)
    padding, hide, each = torch.rand(5, 7)>.7, torch.rand(7, 7)>.7, torch.randn(20, 7, 7)
    padding[:, 0] = False; hide[:, 0] = False
    for kw in ({}, dict(attn_mask=hide), dict(attn_mask=each), dict(key_padding_mask=padding), dict(attn_mask=hide, key_padding_mask=padding)):
        assert torch.allclose(wrapped(x, x, x, **kw)[0], attn(x, x, x, need_weights=False, **kw)[0], atol=1e-5)
    with pytest.raises(ValueError, match='key'): wrapped(x, x+1, x)
    with pytest.raises(ValueError, match='need_weights'): wrapped(x, need_weights=True)


@pytest.mark.parametrize('batch_first', [True, False])
def test_full_rank_and_forced_is_the_expert(batch_first):
    model, merged, experts, inputs = tower_case()
    if not batch_first: other = tower(False); other.load_state_dict(model.state_dict()); model = other
    keys = [k for k in inputs[0]]
    x = torch.randn(4, 6, 16)
    full = routed(model, experts, inputs, 16, [k for k in keys if merged[k].shape[0]==16])   # c_proj only: rank 16 is all of it
    for t, e in enumerate(experts):
        ref = tower(batch_first); ref.load_state_dict({k: e[k] if k.endswith('c_proj.weight') else v for k, v in merged.items()})
        assert torch.allclose(full.force(t)(x), ref(x), atol=1e-4)


def test_each_sample_takes_its_own_expert():
    model, merged, experts, inputs = tower_case()
    wrapped = routed(model, experts, inputs, 3)
    x = torch.randn(6, 7, 16)
    together = wrapped(x)
    chosen = {k: r.chosen.clone() for k, r in wrapped.routers.items()}
    alone = torch.cat([wrapped(row[None]) for row in x])
    assert torch.allclose(together, alone, atol=1e-5)
    first = next(iter(wrapped.routers))
    assert all(len(c)==6 for c in chosen.values()) and chosen[first].max()<3


def test_first_layer_may_choose_for_all():
    model, merged, experts, inputs = tower_case()
    wrapped, x = routed(model, experts, inputs, 3), 3*torch.randn(8, 7, 16)
    free = wrapped(x)
    first, *others = wrapped.once().routers.values()
    led = wrapped(x)
    chosen = first.chosen
    assert all(torch.equal(r.chosen, chosen) for r in others)
    each = torch.stack([wrapped.once(False).force(t)(x) for t in range(3)])
    assert torch.allclose(led, each[chosen, torch.arange(8)], atol=1e-5)
    assert torch.allclose(wrapped.force(None)(x), free, atol=1e-6)


def test_router_picks_the_nearest_prototype():
    protos = torch.eye(3, 5)
    r = Router(Residual(torch.zeros(3, 4, 2), torch.zeros(3, 2, 5), protos))
    x = torch.stack([10*protos[2], .1*protos[0], protos[1]]).unsqueeze(1).expand(3, 6, 5)+.01
    assert r.choose(x).tolist()==[2, 0, 1] and r.choose(x[:, 0]).tolist()==[2, 0, 1]
    assert Router(Residual(torch.zeros(3, 4, 2), torch.zeros(3, 2, 5), protos), 0).choose(x.transpose(0, 1)).tolist()==[2, 0, 1]


def test_residuals_and_storage():
    model, merged, experts, inputs = tower_case()
    found = residuals([task_vector(merged, e) for e in experts], inputs, 4)
    assert sorted(found)==sorted(routed_keys(list(inputs[0]))) and all('c_proj' not in k for k in found)
    for k, r in found.items():
        for t, (e, x) in enumerate(zip(experts, inputs)):
            b, c, _ = essential_subspace(e[k]-merged[k], x[k], 4)
            assert gap(r.basis[t]@r.coords[t], b@c)<1e-4 and torch.allclose(r.prototypes[t], x[k].mean(0), atol=1e-6)
    wrapped = routed(model, experts, inputs, 4)
    count = sum(3*(4*(merged[k].shape[0]+merged[k].shape[1])+merged[k].shape[1]) for k in found)
    assert wrapped.extra_parameters==count and wrapped.share==pytest.approx(count/sum(v.numel() for v in merged.values()))
    assert all(torch.equal(p, merged[k]) for k, p in model.named_parameters())          # the model given is left alone
    assert routed_keys(['encoder.q.weight'])==['encoder.q.weight']


# ---- what is refused

def broken(which):
    taus, inputs = make(4)
    k = block.format(1)+'mlp.c_fc.weight'
    if which=='missing': del inputs[2][k]
    if which=='width': inputs[2][k] = inputs[2][k][:, :-1]
    if which=='nan': inputs[2][k][3, 3] = float('nan')
    if which=='inf': inputs[2][k][3, 3] = float('inf')
    if which=='empty': inputs[2][k] = inputs[2][k][:0]
    if which=='ndim': inputs[2][k] = inputs[2][k][None]
    if which=='type': inputs[2][k] = inputs[2][k].tolist()
    if which=='fewer': inputs = inputs[:-1]
    if which=='unknown': [x.update({'no.such.weight': x[k]}) for x in inputs]
    if which=='vector': [x.update({block.format(0)+'ln_1.weight': x[k]}) for x in inputs]
    if which=='text': [x.update({'text_projection': torch.randn(9, 16)}) for x in inputs]
    if which=='moments': inputs[2][k] = Moments(torch.eye(3), 4)
    return taus, inputs

@pytest.mark.parametrize('which, error, match', [
    ('missing', ValueError, r'resblocks\.1\.mlp\.c_fc\.weight.*experts 2'), ('width', ValueError, r"inputs\[2\].*resblocks\.1\.mlp\.c_fc\.weight.*width 23"),
    ('nan', ValueError, r'resblocks\.1\.mlp\.c_fc\.weight.*NaN'), ('inf', ValueError, r'resblocks\.1\.mlp\.c_fc\.weight.*Inf'), ('empty', ValueError, 'c_fc.*empty'),
    ('ndim', ValueError, r'c_fc.*\(n, in\)'), ('type', TypeError, 'c_fc'), ('fewer', ValueError, '4 experts, not 3'), ('unknown', ValueError, 'no.such.weight'),
    ('vector', ValueError, 'ln_1'), ('text', ValueError, 'text_projection'), ('moments', ValueError, 'c_fc.*width 3')])
def test_refuses_inputs(which, error, match):
    with pytest.raises(error, match=match): esm(*broken(which))
    with pytest.raises(error, match=match): esd_keys(*broken(which))


def test_refuses_more_experts_than_rows():
    k = block.format(0)+'mlp.c_proj.weight'
    taus = [TaskVector({k: torch.randn(3, 8), 'visual.proj': torch.randn(9, 9)}) for _ in range(4)]
    with pytest.raises(ValueError, match=r'4 experts.*c_proj.*k = 0'): esm(taus, [{k: torch.randn(9, 8)} for _ in taus])
    small = [TaskVector({k: torch.randn(8, 8), 'visual.positional_embedding': torch.randn(3, 8)}) for _ in range(4)]
    inputs = [{k: torch.randn(9, 8)} for _ in small]
    with pytest.raises(ValueError, match=r'positional_embedding.*k = 0'): esm(small, inputs)
    out = esm(small, inputs, select=room_for(4))['visual.positional_embedding']
    assert torch.allclose(out, sum(t['visual.positional_embedding'] for t in small)/4, atol=1e-6)


@pytest.mark.parametrize('call, error, match', [
    (lambda: check_variant('iccv'), ValueError, 'variant'), (lambda: check_variant(3), ValueError, 'variant'), (lambda: Steps(basis='pca'), ValueError, 'basis'),
    (lambda: Steps(norm='half'), ValueError, 'norm'), (lambda: Steps(weight=-1), ValueError, 'weight'), (lambda: Steps(weight=True), ValueError, 'weight'),
    (lambda: esm(*make(4), variant='iccv'), ValueError, 'variant'), (lambda: esm([], []), ValueError, 'taus'), (lambda: esm(make(4)[0], [[]]*4), TypeError, 'inputs'),
    (lambda: esm(make(4)[0], make(4)[1][0]), ValueError, 'inputs'), (lambda: esm([make(1)[0][0]]*2, make(2)[1]), ValueError, 'same expert')])
def test_refusals_name_the_parameter(call, error, match):
    with pytest.raises(error, match=match): call()


def test_routing_refuses():
    model, merged, experts, inputs = tower_case()
    w = dict(model.named_parameters())
    out_proj = 'resblocks.0.attn.out_proj.weight'
    with pytest.raises(ValueError, match='rank|k must'): routed(model, experts, inputs, 0)
    with pytest.raises(ValueError, match='nowhere'): routed(model, experts, inputs, 4, ['nowhere'])
    with pytest.raises(ValueError, match='out_proj'): RoutedModel(model, {out_proj: zero(w[out_proj])})
    with pytest.raises(ValueError, match='nowhere'): RoutedModel(model, {'nowhere': zero(w[out_proj])})
    with pytest.raises(ValueError, match='c_fc'): RoutedModel(model, {'resblocks.0.mlp.c_fc.weight': zero(w[out_proj])})
    with pytest.raises(ValueError, match='extra.weight'): routed(model, experts, [x | {'extra.weight': torch.ones(3, 3)} for x in inputs])
    moments = [{k: second_moment(v) for k, v in x.items()} for x in inputs]
    with pytest.raises(TypeError, match='rows'): routed(model, experts, moments)
    with pytest.raises(ValueError, match='fused'): RoutedAttention(nn.MultiheadAttention(8, 2, kdim=4), Router(zero(torch.ones(24, 8))))
