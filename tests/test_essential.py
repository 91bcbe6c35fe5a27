"Oracles and invariances of the essential subspace, hooks on models of open_clip, torch and transformers, and refusals."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from conftest import gap
from subspace_nb.essential import (Moments, cka, collect_inputs, collect_moments, essential_subspace, essential_tails, essential_truncate, linear_sites,
                                   second_moment, svd_tails, truncate, truncate_task_vector, truncation_error)
from subspace_nb.experts import import_open_clip
from subspace_nb.tasks import TaskVector


def draw(out, width, n, seed=0, dtype=torch.float64, decay=2.):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    scale = torch.logspace(0, -decay, width, dtype=torch.float64)
    return (rand(out, width)*scale.flip(0)).to(dtype), (rand(n, width)*scale).to(dtype)

def eye_gap(basis): return (basis.mT@basis-torch.eye(basis.shape[-1], dtype=basis.dtype)).abs().max().item()

shapes = st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 20), st.integers(0, 10**6))


# ---- the decomposition

@given(shapes)
def test_both_routes_against_a_plain_svd(case):
    out, width, n, seed = case
    dw, x = draw(out, width, n, seed)
    s = torch.linalg.svdvals(x@dw.mT)
    want = torch.zeros(min(out, width), dtype=torch.float64); want[:min(len(s), len(want))] = (s.square()/max(1, n-1))[:len(want)]
    for source, squared in ((x, False), (x, True), (second_moment(x), False)):
        basis, coords, energy = essential_subspace(dw, source, squared=squared)
        assert basis.shape==(out, min(out, width)) and coords.shape==(min(out, width), width) and energy.shape==(min(out, width),)
        assert eye_gap(basis)<1e-9
        assert (energy-want).abs().max()<=1e-9*want.max()+1e-300
        assert (energy>=0).all() and (energy.diff()<=1e-12*energy[0]).all()
        assert gap(coords, basis.mT@dw)<1e-9
        assert gap(basis@coords, dw)<1e-7 # every direction that dw has is in

@given(shapes, st.data())
def test_truncation_error_is_the_tail(case, data):
    out, width, n, seed = case
    dw, x = draw(out, width, n, seed)
    k = data.draw(st.integers(1, min(out, width)))
    for source in (x, second_moment(x)):
        total = svd_tails(dw, source)[0].item()
        assert svd_tails(dw, source)[k].item()==pytest.approx(truncation_error(dw, truncate(dw, k), source).item(), rel=1e-8, abs=1e-12*total)
        assert essential_tails(dw, source)[k].item()==pytest.approx(truncation_error(dw, essential_truncate(dw, source, k), source).item(), rel=1e-8, abs=1e-11*total)
    assert (essential_tails(dw, x) <= svd_tails(dw, x)*(1+1e-9)+1e-11*total).all() # Theorem 3: nothing of rank k is closer

@given(shapes, st.data())
def test_no_other_matrix_of_rank_k_is_closer(case, data):
    out, width, n, seed = case
    dw, x = draw(out, width, n, seed)
    k = data.draw(st.integers(1, out))
    g = torch.Generator().manual_seed(seed+1)
    rival = torch.linalg.lstsq(x, (x@dw.mT)@(p := torch.linalg.qr(torch.randn(out, k, generator=g, dtype=torch.float64)).Q)).solution.mT
    total = truncation_error(dw, torch.zeros_like(dw), x).item()
    best = truncation_error(dw, essential_truncate(dw, x, k), x).item()
    assert truncation_error(dw, p@rival, x).item()>=best*(1-1e-9)-1e-11*total

def test_more_directions_than_the_shift_has():
    dw, x = draw(12, 5, 3)
    basis, coords, energy = essential_subspace(dw, x, 12)
    assert eye_gap(basis)<1e-12 and gap(basis@coords, dw)<1e-12
    assert (energy[:3]>0).all() and not energy[3:].any()
    u = torch.linalg.svd(dw-basis[:, :3]@coords[:3]).U # what the inputs never reach is ordered by its own SVD
    assert torch.allclose((u[:, :2].mT@basis[:, 3:5]).abs(), torch.eye(2, dtype=torch.float64), atol=1e-9)
    assert coords[5:].abs().max()<1e-12
    again = essential_subspace(dw, second_moment(x), 12)
    assert gap(again[0][:, :5], basis[:, :5])<1e-6 and eye_gap(again[0])<1e-12

def test_a_zero_matrix_and_zero_inputs():
    dw, x = draw(6, 4, 9)
    for d, rows in ((0*dw, x), (dw, 0*x)):
        for source in (rows, second_moment(rows)):
            basis, coords, energy = essential_subspace(d, source, 5)
            assert eye_gap(basis)<1e-12 and not energy.any() and gap(coords, basis.mT@d)<1e-12
    assert gap(essential_truncate(dw, 0*x, 2), truncate(dw, 2))<1e-9 # inputs that say nothing leave it to the SVD

@pytest.mark.parametrize('tall', [True, False])
def test_white_inputs_give_the_svd(tall):
    dw, _ = draw(*((9, 5) if tall else (5, 9)), 1)
    assert gap(essential_truncate(dw, Moments(torch.eye(dw.shape[1], dtype=torch.float64)*7, 7), 3), truncate(dw, 3))<1e-9

@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_invariances(seed, c):
    dw, x = draw(8, 6, 30, seed)
    basis, coords, energy = essential_subspace(dw, x, 4)
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    turned = essential_subspace(dw@q, x@q, 4)             # another basis of the inputs
    assert gap(turned[0], basis)<1e-6 and gap(turned[1], coords@q)<1e-6 and gap(turned[2], energy)<1e-9
    scaled = essential_subspace(c*dw, x, 4)
    assert gap(scaled[0], basis)<1e-6 and gap(scaled[2], c*c*energy)<1e-9
    shuffled = essential_subspace(dw, x.flip(0), 4)       # the order of rows
    assert gap(shuffled[0], basis)<1e-6

def test_batches_equal_their_members():
    dws = torch.stack([draw(7, 5, 20, s)[0] for s in range(6)]).reshape(2, 3, 7, 5)
    xs = torch.stack([draw(7, 5, 20, s)[1] for s in range(6)]).reshape(2, 3, 20, 5)
    one, own = essential_subspace(dws, xs[0, 0], 3), essential_subspace(dws, xs, 3)
    for i in range(2):
        for j in range(3):
            for got, want in zip(one, essential_subspace(dws[i, j], xs[0, 0], 3)): assert torch.equal(got[i, j], want)
            for got, want in zip(own, essential_subspace(dws[i, j], xs[i, j], 3)): assert torch.equal(got[i, j], want)
    assert svd_tails(dws, xs).shape==essential_tails(dws, xs).shape==(2, 3, 6)
    assert torch.allclose(truncation_error(dws, essential_truncate(dws, xs, 3), xs), essential_tails(dws, xs)[..., 3])

@pytest.mark.parametrize('dtype, tol', [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_other_precisions(dtype, tol):
    dw, x = draw(9, 7, 40, dtype=dtype)
    want = essential_subspace(dw.double(), x.double(), 4)
    for source in (x, second_moment(x)):
        basis, coords, energy = essential_subspace(dw, source, 4)
        assert basis.dtype==coords.dtype==dtype and energy.dtype==torch.float32
        assert gap(basis, want[0])<tol and gap(coords, want[1])<tol and gap(energy, want[2])<1e-5
        assert essential_truncate(dw, source, 4).dtype==truncate(dw, 4).dtype==dtype

def test_moments_add_up():
    _, x = draw(4, 6, 30)
    parts = sum(second_moment(p) for p in x.split(7))
    assert parts.rows==30 and gap(parts.gram, x.mT@x)<1e-14
    assert second_moment(x.float()).gram.dtype==torch.float64 and parts.to('cpu').rows==30
    with pytest.raises(TypeError): parts+1
    with pytest.raises(ValueError, match='width 6 and 4'): parts+second_moment(x[:, :4])

def test_one_row():
    dw, x = draw(6, 4, 1)
    _, _, energy = essential_subspace(dw, x)
    assert energy[0].item()==pytest.approx((dw@x[0]).square().sum().item()) and energy.isfinite().all()

@given(st.integers(0, 10**6))
def test_cka(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(20, d, generator=g, dtype=torch.float64) for d in (5, 7))
    q = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64)).Q
    assert cka(a, 3*a@q+2).item()==pytest.approx(1)
    assert cka(a, b).item()==pytest.approx(cka(b, a).item()) and 0<=cka(a, b)<1
    h = torch.eye(20, dtype=torch.float64)-1/20 # as published: from kernels
    k, l = h@a@a.mT@h, h@b@b.mT@h
    assert cka(a, b).item()==pytest.approx(((k*l).sum()/(k.norm()*l.norm())).item())

def test_a_model_is_truncated_where_inputs_are_known():
    dw, x = draw(10, 8, 30)
    tau = TaskVector({'a.weight': dw, 'b.weight': dw+1, 'a.bias': dw[0]})
    for by in ('svd', 'essential'):
        half = truncate_task_vector(tau, .5, {'a.weight': x}, by)
        assert torch.equal(half['b.weight'], tau['b.weight']) and torch.equal(half['a.bias'], tau['a.bias'])
        assert torch.linalg.matrix_rank(half['a.weight'])==4
        assert torch.linalg.matrix_rank(truncate_task_vector(tau, 1e-3, {'a.weight': x}, by)['a.weight'])==1
        assert gap(truncate_task_vector(tau, 1., {'a.weight': x}, by)['a.weight'], dw)<1e-9


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    dw, x = draw(40, 24, 90)
    want = essential_subspace(dw, x, 9)
    for source in (x.cuda(), second_moment(x.cuda()), second_moment(x)):
        for got, ref in zip(essential_subspace(dw.cuda(), source, 9), want): assert got.is_cuda and gap(got.cpu(), ref)<1e-6
        assert gap(essential_tails(dw.cuda(), source).cpu(), essential_tails(dw, x))<1e-6 and gap(svd_tails(dw.cuda(), source).cpu(), svd_tails(dw, x))<1e-9
    model = nn.Sequential(nn.Linear(24, 5)).cuda()
    assert collect_moments(model, [x.float().cuda()])['0.weight'].gram.is_cuda and not collect_inputs(model, [x.float().cuda()], device='cpu')['0.weight'].is_cuda


# ---- refusals

good_dw, good_x = draw(6, 4, 9)
bad_x = {'width': good_x[:, :3], 'shape': good_x[0], 'empty': good_x[:0], 'NaN': good_x*float('nan'), 'floating': good_x.long(), 'Moments': 'x'}

@pytest.mark.parametrize('what', bad_x)
@pytest.mark.parametrize('fn', [lambda x: essential_subspace(good_dw, x), lambda x: essential_truncate(good_dw, x, 2), lambda x: svd_tails(good_dw, x),
                                lambda x: essential_tails(good_dw, x), lambda x: truncation_error(good_dw, good_dw, x)])
def test_inputs_are_refused_by_name(fn, what):
    with pytest.raises((ValueError, TypeError), match=f'x .*{what}'): fn(bad_x[what])

@pytest.mark.parametrize('moments, text', [(Moments(torch.eye(3).double(), 5), 'width'), (Moments(torch.eye(4).double(), 0), 'row'),
                                           (Moments(torch.ones(3, 4).double(), 5), 'square'), (Moments(torch.eye(4).double()*float('inf'), 5), 'Inf')])
def test_moments_are_refused_by_name(moments, text):
    with pytest.raises(ValueError, match=f'x .*{text}'): essential_subspace(good_dw, moments)

@pytest.mark.parametrize('k, error', [(0, ValueError), (-1, ValueError), (7, ValueError), (1.5, TypeError), (True, TypeError), ('2', TypeError)])
@pytest.mark.parametrize('fn', [lambda k: essential_subspace(good_dw, good_x, k), lambda k: essential_truncate(good_dw, good_x, k), lambda k: truncate(good_dw, k)])
def test_ranks_are_refused_by_name(fn, k, error):
    with pytest.raises(error, match='k must'): fn(k)

def test_integers_of_any_kind_are_ranks():
    for k in (np.int64(2), torch.tensor(2)): assert truncate(good_dw, k).shape==good_dw.shape

def test_other_refusals():
    with pytest.raises(ValueError, match='dw has NaN'): essential_subspace(good_dw*float('nan'), good_x)
    with pytest.raises(TypeError, match='dw'): essential_subspace([[1.]], good_x)
    with pytest.raises(ValueError, match='leading'): essential_subspace(good_dw, good_x.expand(2, 9, 4))
    with pytest.raises(ValueError, match='dw_k'): truncation_error(good_dw, good_dw.mT, good_x)
    with pytest.raises(ValueError, match='shape'): second_moment(good_x[None])
    with pytest.raises(ValueError, match='a is the same'): cka(torch.ones(4, 3), torch.randn(4, 2))
    with pytest.raises(ValueError, match='a and b'): cka(torch.randn(4, 3), torch.randn(5, 2))
    tau = TaskVector({'a.weight': good_dw})
    for kwargs, text in ((dict(by='pca'), 'by must'), (dict(share=0.), 'share'), (dict(share=2.), 'share'), (dict(inputs={'b': good_x}), 'b'), (dict(inputs={'a.weight': good_x[:, :2]}), 'a.weight')):
        with pytest.raises(ValueError, match=text): truncate_task_vector(tau, **dict(share=.5, inputs={'a.weight': good_x}) | kwargs)


# ---- hooks

@pytest.fixture(scope='module')
def tower():
    torch.manual_seed(0)
    return import_open_clip().transformer.VisionTransformer(image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp_ratio=2., output_dim=6)

images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))

def agrees(model, batches, used, **kwargs):
    "The collected rows times the weight are what the layer put out: {name: its module} -> rows."
    rows, outs, hooks = collect_inputs(model, batches, **kwargs), {}, []
    for name, m in used.items(): hooks.append(m.register_forward_hook(lambda m, a, o, name=name: outs.setdefault(name, []).append(o.flatten(0, -2))))
    model.eval()
    with torch.no_grad():
        for b in batches: model(**b) if isinstance(b, dict) else model(b)
    for h in hooks: h.remove()
    for name, m in used.items(): assert torch.allclose(nn.functional.linear(rows[name], m.weight, m.bias), torch.cat(outs[name]), atol=1e-5)
    moments = collect_moments(model, batches, **kwargs)
    assert set(moments)==set(rows)
    for k in rows: assert moments[k].rows==len(rows[k]) and gap(moments[k].gram, rows[k].double().mT@rows[k].double())<1e-12
    return rows

def test_open_clip_tower(tower):
    linear = {f'transformer.resblocks.{i}.mlp.{part}.weight': getattr(tower.transformer.resblocks[i].mlp, part) for i in (0, 1) for part in ('c_fc', 'c_proj')}
    rows = agrees(tower, list(images.split(2)), linear)
    assert set(rows)==set(linear)|{f'transformer.resblocks.{i}.attn.in_proj_weight' for i in (0, 1)} # out_proj is multiplied out of sight
    got = []
    hook = tower.transformer.resblocks[1].ln_1.register_forward_hook(lambda m, a, o: got.append(o.flatten(0, 1)))
    tower(images); hook.remove()
    assert torch.allclose(rows['transformer.resblocks.1.attn.in_proj_weight'], got[0], atol=1e-5) and len(got[0])==25

def test_open_clip_attention_of_its_own():
    Attention = import_open_clip().transformer.Attention
    torch.manual_seed(0)
    model = nn.Sequential(Attention(8, 2))
    x = torch.randn(3, 4, 8)
    rows = collect_inputs(model, [x])
    assert set(rows)=={'0.in_proj_weight', '0.out_proj.weight'} and torch.equal(rows['0.in_proj_weight'], x.flatten(0, 1))

def test_transformers_clip_vision():
    from transformers import CLIPVisionConfig, CLIPVisionModel
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4))
    names = [k for k in linear_sites(model) if k.endswith(('layers.0.self_attn.q_proj.weight', 'layers.1.mlp.fc1.weight', 'layers.1.self_attn.out_proj.weight'))]
    assert len(names)==3
    rows = agrees(model, [dict(pixel_values=b) for b in images.split(2)], {k: model.get_submodule(k.removesuffix('.weight')) for k in names})
    assert len(rows)==12 and all(len(r)==25 for r in rows.values())

def test_transformers_vit():
    from transformers import ViTConfig, ViTModel
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4))
    sites = [k for k in linear_sites(model) if '.0.' in k]
    assert len(sites)==6
    agrees(model, [dict(pixel_values=images)], {k: model.get_submodule(k.removesuffix('.weight')) for k in sites})

words = torch.randint(1, 30, (4, 6), generator=torch.Generator().manual_seed(2))
mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
batch = dict(input_ids=words, attention_mask=mask)

def test_transformers_bert_without_padding():
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2))
    name = 'encoder.layer.1.attention.self.query.weight'
    every, kept = collect_inputs(model, batch, name)[name], collect_inputs(model, batch, mask='attention_mask')
    assert len(every)==24 and torch.equal(every[mask.bool().flatten()], kept[name]) and len(kept['pooler.dense.weight'])==4
    short = collect_inputs(model, [dict(input_ids=words[1:2, :3], attention_mask=mask[1:2, :3])], name)[name]
    assert torch.allclose(kept[name][6:9], short, atol=1e-5) # padding changes nothing
    assert torch.equal(collect_inputs(model, batch, name, mask=lambda b: b['attention_mask'])[name], kept[name])
    assert collect_moments(model, [batch]*3, name, mask='attention_mask')[name].rows==3*int(mask.sum())

def test_transformers_t5_and_tied_weights():
    from transformers import T5Config, T5ForConditionalGeneration
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, tie_word_embeddings=True))
    rows = collect_inputs(model, [dict(batch, decoder_input_ids=words[:, :3])])
    assert len(rows['encoder.block.1.layer.0.SelfAttention.q.weight'])==24
    assert len(rows['decoder.block.1.layer.1.EncDecAttention.k.weight'])==24 and len(rows['decoder.block.1.layer.1.EncDecAttention.q.weight'])==12
    if model.lm_head.weight is model.shared.weight: assert len(collect_inputs(model, [dict(batch, decoder_input_ids=words[:, :3])], 'shared.weight')['shared.weight'])==12

def test_a_weight_used_twice_accumulates():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(5, 3)
    rows = collect_inputs(model, x)
    assert torch.equal(rows['0.weight'], torch.cat([x, layer(x).relu()])) and torch.equal(rows['0.weight'], rows['2.weight'])
    assert collect_moments(model, x, ['2.weight'])['2.weight'].rows==10

@pytest.mark.parametrize('batch_first', [True, False])
def test_tokens_first(batch_first):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    x = torch.randn(4, 6, 8) if batch_first else torch.randn(6, 4, 8)
    keep = mask.bool() if batch_first else mask.bool().mT
    rows = collect_inputs(model, [x], mask=lambda b: mask)
    assert torch.equal(rows['self_attn.in_proj_weight'], x[keep]) and len(rows['linear1.weight'])==int(mask.sum())

def test_cross_attention_is_refused_or_left_out():
    class Cross(nn.Module):
        def __init__(self): super().__init__(); self.attn, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 2)
        def forward(self, x): return self.out(self.attn(x, x*2, x*2)[0])
    x = torch.randn(4, 6, 8)
    assert set(collect_inputs(Cross(), [x]))=={'out.weight'}
    with pytest.raises(ValueError, match='attn.in_proj_weight.*cross'): collect_inputs(Cross(), [x], ['attn.in_proj_weight'])

def test_a_call_of_your_own(tower):
    class Both(nn.Module):
        def __init__(self): super().__init__(); self.visual, self.text = tower, nn.Linear(3, 3)
        def encode_image(self, x): return self.visual(x)
    rows = collect_inputs(Both(), [images], call=lambda m, b: m.encode_image(b))
    assert len(rows)==6 and all(k.startswith('visual.') for k in rows)
    assert torch.equal(collect_inputs(tower, [(images,)])['transformer.resblocks.0.mlp.c_fc.weight'], rows['visual.transformer.resblocks.0.mlp.c_fc.weight'])

def n_hooks(model): return sum(len(m._forward_pre_hooks)+len(m._forward_hooks) for m in model.modules())

def test_the_model_is_left_as_it_was(tower):
    tower.train(); tower.ln_pre.eval()
    modes, state = [m.training for m in tower.modules()], {k: v.clone() for k, v in tower.state_dict().items()}
    with torch.inference_mode(): collect_moments(tower, [images])
    collect_moments(tower, [images])
    def broken():
        yield images
        raise RuntimeError('disk')
    with pytest.raises(RuntimeError, match='disk'): collect_inputs(tower, broken())
    with pytest.raises(ValueError, match='resblocks.0.attn.in_proj_weight have NaN'): collect_inputs(tower, [images*float('nan')])
    assert [m.training for m in tower.modules()]==modes and n_hooks(tower)==0
    assert all(torch.equal(v, state[k]) for k, v in tower.state_dict().items()) and torch.is_grad_enabled()

def test_results_are_ordinary_tensors(tower):
    rows = collect_inputs(tower, [images], ['transformer.resblocks.0.mlp.c_fc.weight'])['transformer.resblocks.0.mlp.c_fc.weight']
    assert not rows.is_inference() and not rows.requires_grad

def test_half_precision_inputs():
    model = nn.Sequential(nn.Linear(4, 3)).bfloat16()
    x = torch.randn(6, 4).bfloat16()
    assert collect_inputs(model, [x])['0.weight'].dtype==torch.float32
    assert gap(collect_moments(model, [x])['0.weight'].gram, x.double().mT@x.double())<1e-14

@pytest.mark.parametrize('names, text', [(['nope.weight'], 'no parameter nope.weight'), (['ln_pre.weight'], 'two dimensions'), (['conv1.weight'], 'two dimensions'), ([], 'empty'),
    (['positional_embedding'], 'positional_embedding'), (['proj'], 'no hook'), (['transformer.resblocks.0.attn.out_proj.weight'], 'out_proj.weight: its module is never called')])
def test_names_are_refused(tower, names, text):
    with pytest.raises(ValueError, match=text): collect_inputs(tower, [images], names)
    assert n_hooks(tower)==0

def test_batches_are_refused(tower):
    with pytest.raises(ValueError, match='no layer saw'): collect_inputs(tower, [])
    with pytest.raises(TypeError, match='batches'): collect_inputs(tower, 5)
    with pytest.raises(TypeError, match='model'): collect_inputs(lambda x: x, [images])
    with pytest.raises(ValueError, match='no linear layer'): collect_inputs(nn.ReLU(), [images])
