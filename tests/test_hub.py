"""Checkpoints on disk: every format, every kind of damage, layouts, adapters, the hub's cache."""
import json, os, pickle, re
from pathlib import Path
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from subspace_nb.boost import boost
from subspace_nb.experts import import_open_clip, sha256
from subspace_nb.hub import (Adapter, Checkpoint, Layout, boost_factors, clip_models, commit_of, dtype_names, fetch, from_open_clip, fusion_bench_tasks, hub_ids, image_tower, join_qkv, layouts, locate, merge_adapters, pinned,
                             pool_from_hub, read_entry, read_header, read_index, read_pickle, recognise, save_adapter, split_qkv, t5_base, to_open_clip, unit_shape, zero_shot_head)
from subspace_nb.spectra import numerical_rank
from subspace_nb.tasks import task_vector
from conftest import gap

open_clip = import_open_clip()
import transformers
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()

VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
TEXT = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=99, max_position_embeddings=12)

@pytest.fixture(scope='module')
def clip():
    torch.manual_seed(0)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()

@pytest.fixture(scope='module')
def sharded(clip, tmp_path_factory):
    d = tmp_path_factory.mktemp('sharded')
    clip.save_pretrained(d, max_shard_size='60KB')
    return d

def copy(src, dst):
    dst.mkdir()
    for f in src.iterdir(): (dst/f.name).write_bytes(f.read_bytes())
    return dst

# one file

kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]

@given(st.lists(st.tuples(st.sampled_from(kinds), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=5), st.integers(0, 9))
def test_reads_what_safetensors_writes(tmp_path, entries, seed):
    torch.manual_seed(seed)
    state = {f'p.{i}': (10*torch.randn(s)).to(t) for i, (t, s) in enumerate(entries)}
    save_file(state, f := tmp_path/'x.safetensors', metadata={'format': 'pt'})
    header, meta = read_header(f)
    assert meta=={'format': 'pt'} and set(header)==set(state)
    for k, v in state.items():
        got = read_entry(header[k])
        assert got.dtype==v.dtype and got.shape==v.shape and torch.equal(got, v)
        n = v.numel()
        assert torch.equal(read_entry(header[k], slice(n//3, n-n//4)), v.flatten()[n//3:n-n//4])

def test_dtype_names_are_those_of_safetensors(tmp_path):
    for t in kinds:
        save_file({'x': torch.zeros(2).to(t)}, tmp_path/'x.safetensors')
        with safe_open(tmp_path/'x.safetensors', 'pt') as f: assert f.get_slice('x').get_dtype()==dtype_names[t]

@given(st.data())
def test_every_truncation_is_refused(tmp_path, data):
    save_file({'a': torch.ones(3, 5), 'b': torch.ones(7)}, f := tmp_path/'x.safetensors')
    whole = f.read_bytes()
    f.write_bytes(whole[:data.draw(st.integers(0, len(whole)-1))])
    with pytest.raises(ValueError, match='damaged.*'): read_header(f)

@given(st.data())
def test_garbled_headers_raise_one_kind_of_error(tmp_path, data):
    save_file({'a': torch.ones(3, 5), 'b': torch.ones(7)}, f := tmp_path/'x.safetensors')
    whole = bytearray(f.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))): whole[data.draw(st.integers(0, 8+int.from_bytes(whole[:2], 'little')-1))] = data.draw(st.integers(0, 255))
    f.write_bytes(bytes(whole))
    try: header, _ = read_header(f)
    except ValueError as e: assert 'x.safetensors' in str(e)
    else: assert all(e.stop<=len(whole) and read_entry(e).shape==e.shape for e in header.values())

def handmade(path, header, body=b''):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little')+text+body)
    return path

@pytest.mark.parametrize('header, why', [
    ({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}, 'b': {'dtype': 'F32', 'shape': [2], 'data_offsets': [4, 12]}}, 'b begin at 4'),
    ({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [4, 12]}}, 'a begin at 4'), ({'a': {'dtype': 'F32', 'shape': [3], 'data_offsets': [0, 8]}}, 'a has 8 bytes'),
    ({'a': {'dtype': 'F99', 'shape': [2], 'data_offsets': [0, 8]}}, 'F99'), ({'a': {'shape': [2]}}, 'lacks'), ({'a': 3}, 'lacks'), ([1], 'no mapping'),
    ({'a': {'dtype': 'F32', 'shape': [2, -1], 'data_offsets': [0, -8]}}, 'lacks'), ({'a': {'dtype': 'F32', 'shape': ['2'], 'data_offsets': [0, 8]}}, 'lacks'),
    ({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': ['0', 8]}}, 'lacks'), ({'a': {'dtype': 'F32', 'shape': [2.0], 'data_offsets': [0, 8]}}, 'lacks')])
def test_headers_that_lie(tmp_path, header, why):
    with pytest.raises(ValueError, match=why): read_header(handmade(tmp_path/'x.safetensors', header, bytes(12)))

def test_a_file_that_shrinks_after_opening(tmp_path):
    save_file({'a': torch.ones(3000)}, f := tmp_path/'x.safetensors')
    c = Checkpoint(f)
    os.truncate(f, 5000)
    with pytest.raises(ValueError, match='changed its length'): c['a']

# pickles

class Boom:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)

@pytest.mark.parametrize('legacy', [False, True])
def test_malicious_pickles(tmp_path, legacy):
    torch.save({'w': torch.ones(2), 'x': Boom(tmp_path/'owned')}, f := tmp_path/'x.pt', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match='x.pt is refused'): Checkpoint(f)
    f.write_bytes(pickle.dumps(Boom(tmp_path/'owned')))
    with pytest.raises(ValueError, match='x.pt'): Checkpoint(f)
    assert not (tmp_path/'owned').exists()

def test_pickles_of_every_honest_shape(tmp_path):
    state = {'a.weight': torch.randn(3, 2), 'b': torch.arange(4)}
    for i, (obj, legacy) in enumerate([(state, False), (state, True), ({'state_dict': state, 'epoch': 3}, False), ({f'module.{k}': v for k, v in state.items()}, False)]):
        torch.save(obj, f := tmp_path/f'{i}.bin', _use_new_zipfile_serialization=not legacy)
        c = Checkpoint(f)
        assert list(c)==list(state) and all(torch.equal(c[k], v) for k, v in state.items()) and torch.equal(c.read('a.weight', slice(1, 4)), state['a.weight'].flatten()[1:4])
    for obj, why in (([1], 'not a mapping|list'), ({'a': 3}, 'more than tensors: a: int')):
        torch.save(obj, tmp_path/'bad.pt')
        with pytest.raises(ValueError, match=why): read_pickle(tmp_path/'bad.pt')
    for n in (0, 1, 100, 400):
        (tmp_path/'cut.pt').write_bytes((tmp_path/'0.bin').read_bytes()[:n])
        with pytest.raises(ValueError, match='cut.pt'): read_pickle(tmp_path/'cut.pt')

# folders

def test_folders_and_shards(clip, sharded, tmp_path):
    c = Checkpoint(sharded)
    assert len(c.shards)>2 and sum(map(len, c.shards.values()))==len(c)==len(clip.state_dict())
    assert all(torch.equal(c[k], v) for k, v in clip.state_dict().items())
    assert {f.name for f in c.companions}=={'config.json'} and c.hashes=={f.name: sha256(f) for f in c.files}
    assert c.activation=='quick_gelu' and 'no.such' not in c and len(c.info())==len(c)
    with pytest.raises(KeyError, match='no.such'): c['no.such']
    with pytest.raises(FileNotFoundError, match='no weights'): Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match='does not exist'): Checkpoint(tmp_path/'nothing')
    (tmp_path/'x.xyz').write_text('')
    with pytest.raises(ValueError, match='ending'): Checkpoint(tmp_path/'x.xyz')
    (tmp_path/'a.pt').write_text(''); (tmp_path/'b.pt').write_text('')
    with pytest.raises(FileNotFoundError, match='several'): Checkpoint(tmp_path)

@pytest.mark.parametrize('where', ['../x.safetensors', 'a/../../x.safetensors', '/etc/passwd', '..\\x.safetensors', 'C:\\x.safetensors', '\\\\host\\x'])
def test_an_index_that_leaves_the_folder(sharded, tmp_path, where):
    d = copy(sharded, tmp_path/'d')
    f = d/'model.safetensors.index.json'
    index = json.loads(f.read_text()); index['weight_map']['logit_scale'] = where
    f.write_text(json.dumps(index))
    with pytest.raises(ValueError, match='index.json is refused.*leaves the folder'): Checkpoint(d)

@pytest.mark.parametrize('text', ['{', '[]', '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}', ''])
def test_damaged_indices(tmp_path, text):
    (tmp_path/'model.safetensors.index.json').write_text(text)
    with pytest.raises(ValueError, match='index.json is damaged'): read_index(tmp_path/'model.safetensors.index.json')

def test_shards_missing_superfluous_and_swapped(sharded, tmp_path):
    d = copy(sharded, tmp_path/'d')
    first, second = sorted(d.glob('*.safetensors'))[:2]
    kept = first.read_bytes(); first.unlink()
    with pytest.raises(FileNotFoundError, match=f'1 of .* shards are missing: {first.name}'): Checkpoint(d)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match='does not look for there'): Checkpoint(d)
    first.write_bytes(kept); Checkpoint(d)
    f = d/'model.safetensors.index.json'
    index = json.loads(f.read_text()); index['weight_map']['ghost'] = first.name; f.write_text(json.dumps(index))
    with pytest.raises(ValueError, match='do not hold: ghost'): Checkpoint(d)

def test_links_inside_a_folder_are_fine(sharded, tmp_path):
    d, blobs = tmp_path/'snapshot', tmp_path/'blobs'
    d.mkdir(); blobs.mkdir()
    for f in sharded.iterdir(): (blobs/f.name).write_bytes(f.read_bytes()); (d/f.name).symlink_to(f'../blobs/{f.name}')
    assert len(Checkpoint(d))==len(Checkpoint(sharded))

def test_tied_weights(tmp_path):
    cfg = dict(d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2, vocab_size=50)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**cfg)); t5.save_pretrained(tmp_path/'tied')
    c = Checkpoint(tmp_path/'tied')
    for k in ('shared.weight', 'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', 'lm_head.weight'): assert torch.equal(c[k], t5.shared.weight) and k in c
    d = copy(tmp_path/'tied', tmp_path/'apart')
    state = dict(c) | {'lm_head.weight': torch.randn(50, 16)}
    save_file(state, d/'model.safetensors')
    c = Checkpoint(d)                                                                        # stored twice: two parameters
    assert torch.equal(c['lm_head.weight'], state['lm_head.weight']) and 'lm_head.weight' not in c.aliases('shared.weight')
    save_file({k: v for k, v in state.items() if k!='lm_head.weight'}, d/'model.safetensors')
    (d/'config.json').write_text(json.dumps(json.loads((d/'config.json').read_text()) | dict(tie_word_embeddings=False)))
    assert 'lm_head.weight' not in Checkpoint(d) and 'encoder.embed_tokens.weight' in Checkpoint(d)
    w = torch.randn(3, 4)
    torch.save({'a': w, 'b': w, 'c': w.clone()}, tmp_path/'x.pt')
    assert set(Checkpoint(tmp_path/'x.pt').aliases('a'))=={'a', 'b'}

# layouts

FAMILIES = {
    'transformers CLIP': lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)), 'transformers ViT': lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)),
    'transformers BERT': lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    'transformers T5': lambda: transformers.T5EncoderModel(transformers.T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=50, feed_forward_proj='gated-gelu')),
    'open_clip': lambda: open_clip.CLIP(16, dict(image_size=16, patch_size=8, width=32, layers=2, head_width=16), dict(context_length=12, vocab_size=99, width=24, heads=2, layers=2))}

@pytest.mark.parametrize('name', FAMILIES)
def test_families(name, tmp_path):
    model = FAMILIES[name]()
    if hasattr(model, 'save_pretrained'): model.save_pretrained(tmp_path); c = Checkpoint(tmp_path)
    else: torch.save(model.state_dict(), tmp_path/'x.pt'); c = Checkpoint(tmp_path/'x.pt')
    assert c.layout.name==name and c.layout==recognise(c) and all(n==2 for n in c.layout.towers(c).values())
    joined = join_qkv(c)
    units = c.layout.units(c.shapes)
    assert list(joined)==list(units) and all(tuple(v.shape)==unit_shape(c.shapes, units[k]) for k, v in joined.items())
    back = split_qkv(joined, c)
    assert list(back)==list(c) and all(torch.equal(back[k], c[k]) for k in c)
    assert all(torch.equal(v, dict(c)[k]) for k, v in join_qkv(c, Layout('none', ())).items())
    towers = len(c.layout.towers(c))
    assert sum(map(c.layout.feeds_esm, units))==towers*2*(4 if 'gated' in str(c.activation) else 3)
    if name=='open_clip': return
    order = next(ks for k, ks in units.items() if k.endswith('in_proj_weight'))
    assert [re.search(r'(q|k|v)\w*\.weight$', k)[1] for k in order]==['q', 'k', 'v']

@pytest.mark.parametrize('name, layers, act', [('ViT-B-32-quickgelu', 12, 'quick_gelu'), ('ViT-B-16-quickgelu', 12, 'quick_gelu'), ('ViT-L-14-quickgelu', 24, 'quick_gelu'), ('ViT-B-32', 12, 'gelu')])
def test_open_clips_own_models(name, layers, act, tmp_path):
    config = open_clip.get_model_config(name)
    with torch.device('meta'): names = open_clip.CLIP(**config).state_dict()
    layout = recognise(names)
    assert layout.name=='open_clip' and layout.towers(names)=={'visual.transformer.resblocks': layers, 'transformer.resblocks': 12}
    assert sum(map(layout.feeds_esm, layout.units({k: v.shape for k, v in names.items()})))==3*(layers+12)
    save_file({'logit_scale': torch.ones(())}, tmp_path/'open_clip_model.safetensors')
    (tmp_path/'open_clip_config.json').write_text(json.dumps(dict(model_cfg=config)))
    assert Checkpoint(tmp_path).activation==act

def test_incomplete_or_unequal_projections_stay_apart():
    clip = next(l for l in layouts if l.name=='transformers CLIP')
    names = {f'a.self_attn.{r}_proj.weight': (8, 8) for r in 'qkv'}
    assert list(clip.units(names))==['a.self_attn.in_proj_weight']
    assert list(clip.units(names | {'a.self_attn.k_proj.weight': (4, 8)}))==list(names)         # grouped queries
    assert list(clip.units({k: s for k, s in names.items() if 'v_proj' not in k}))==list(names)[:2]
    assert list(clip.units(names, join=False))==list(names)
    with pytest.raises(ValueError, match='state lacks'): split_qkv({}, {k: torch.ones(s) for k, s in names.items()}, clip)

def test_open_clip_round_trip_and_outputs(clip):
    model = open_clip.CLIP(16, dict(image_size=16, patch_size=8, width=32, layers=2, head_width=16, mlp_ratio=2.),
                           dict(context_length=12, vocab_size=99, width=24, heads=2, layers=2, mlp_ratio=2.), quick_gelu=True).eval()
    model.load_state_dict(to_open_clip(clip.state_dict()))
    x, t = torch.randn(3, 3, 16, 16), torch.randint(1, 90, (3, 12)); t[:, -1] = 98
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(x), clip.get_image_features(x).pooler_output, rtol=1e-4, atol=1e-5)
    back = from_open_clip(model.state_dict())
    assert set(back)==set(clip.state_dict()) and all(torch.equal(back[k], v) for k, v in clip.state_dict().items())
    assert set(image_tower(clip.state_dict()))==set(image_tower({f'model.{k}': v for k, v in model.state_dict().items()}))=={k for k in model.state_dict() if k.startswith('visual.') and k!='visual.proj'}
    with pytest.raises(KeyError, match='open_clip'): from_open_clip({'visual.trunk.x': torch.ones(1)})

# adapters

def make_adapter(path, factors, **config):
    path.mkdir()
    save_file({k: v.contiguous() for k, v in factors.items()}, path/'adapter_model.safetensors')
    (path/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', r=2, lora_alpha=6) | config))
    return path

A, B = torch.randn(2, 5), torch.randn(7, 2)

@pytest.mark.parametrize('config, scale, turned', [({}, 3, False), (dict(use_rslora=True), 6/2**.5, False), (dict(fan_in_fan_out=True), 3, True),
                                                   (dict(alpha_pattern={'lin': 10}), 5, False), (dict(rank_pattern={'^x\\.lin': 4}), 1.5, False)])
def test_adapter_scales(tmp_path, config, scale, turned):
    a = Adapter(make_adapter(tmp_path/'a', {'base_model.model.x.lin.lora_A.weight': A, 'base_model.model.x.lin.lora_B.weight': B}, **config))
    want = scale*(B@A)
    assert gap(a.delta('x.lin.weight'), want.mT if turned else want)<1e-6
    base = {'x.lin.weight': torch.randn(5, 7) if turned else torch.randn(7, 5), 'y': torch.ones(3)}
    assert list(a.task_vector(base))==['x.lin.weight'] and a.delta('y') is None
    with pytest.raises(ValueError, match='x.lin.weight: .* in base'): a.task_vector({'x.lin.weight': torch.ones(3, 3)})

def test_adapters_embeddings_and_whole_tensors(tmp_path):
    a = Adapter(make_adapter(tmp_path/'a', {'base_model.model.emb.lora_embedding_A': torch.randn(2, 9), 'base_model.model.emb.lora_embedding_B': torch.randn(4, 2),
                                            'base_model.model.head.weight': torch.full((3, 4), 2.), 'base_model.model.x.lin.lora_A.weight': A, 'base_model.model.x.lin.lora_B.weight': B}))
    base = {'emb.weight': torch.zeros(9, 4), 'head.weight': torch.ones(3, 4), 'x.lin.weight': torch.zeros(7, 5)}
    tau = a.task_vector(base)
    assert tau['emb.weight'].shape==(9, 4) and torch.equal(tau['head.weight'], torch.ones(3, 4))
    with pytest.raises(ValueError, match='whole tensors'): merge_adapters([a])

@pytest.mark.parametrize('factors, config, why', [
    ({'base_model.model.x.lora_A.weight': A}, {}, 'lacks one factor'), ({'base_model.model.x.lora_A.weight': A, 'base_model.model.x.lora_B.weight': torch.ones(7, 3)}, {}, 'rank 2, B 3'),
    ({'base_model.model.x.lora_A.weight': A, 'base_model.model.x.lora_B.weight': B}, dict(use_dora=True), 'use_dora'),
    ({'base_model.model.x.lora_A.weight': A, 'base_model.model.x.lora_B.weight': B}, dict(peft_type='LOHA'), 'LOHA'),
    ({'base_model.model.x.lora_magnitude_vector': A, }, {}, 'not supported')])
def test_adapters_refused(tmp_path, factors, config, why):
    with pytest.raises(ValueError, match=why): Adapter(make_adapter(tmp_path/'a', factors, **config))

def test_adapter_folder_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match='adapter_config'): Adapter(tmp_path)
    (tmp_path/'adapter_config.json').write_text('{')
    with pytest.raises(ValueError, match='not JSON'): Adapter(tmp_path)
    (tmp_path/'adapter_config.json').write_text('{"r": 2}')
    with pytest.raises(FileNotFoundError, match='neither'): Adapter(tmp_path)
    with pytest.raises(ValueError, match='open it with Adapter'): Checkpoint(tmp_path)

@given(st.integers(0, 99), st.integers(2, 30), st.integers(2, 30), st.integers(1, 6), st.sampled_from([0., .2, .7, 1.]))
def test_boosting_in_factors_is_boosting(seed, out, width, r, beta):
    rng = torch.Generator().manual_seed(seed)
    b, a = torch.randn(out, r, generator=rng), torch.randn(r, width, generator=rng)
    fb, fa = boost_factors(b, a, beta)
    assert fb.shape[1]<=min(r, out, width) and gap(fb@fa, boost((b.double()@a.double()), beta))<1e-4

def test_boosting_zero_factors():
    b, a = boost_factors(torch.zeros(4, 2), torch.randn(2, 3))
    assert torch.equal(b@a, torch.zeros(4, 3))

def test_merge_and_save_adapters(tmp_path):
    make = lambda i: Adapter(make_adapter(tmp_path/f'a{i}', {f'base_model.model.{m}.lora_{x}.weight': torch.randn(*((2, 5) if x=='A' else (7, 2))) for m in (['p', 'q'] if i else ['p']) for x in 'AB'}))
    adapters = [make(i) for i in range(3)]
    merged = merge_adapters(adapters, [.5, .3, .2])
    assert gap(merged['p.weight'][0]@merged['p.weight'][1], sum(w*x.delta('p.weight') for w, x in zip((.5, .3, .2), adapters)))<1e-6
    assert merged['q.weight'][0].shape==(7, 4)
    again = Adapter(save_adapter(merged, tmp_path/'out', adapters[0].config))
    for k, (b, a) in merged.items(): assert gap(again.delta(k), b@a)<1e-6
    flat = merge_adapters(adapters, beta=0.)['q.weight']
    assert numerical_rank(flat[0]@flat[1]).item()==4
    with pytest.raises(ValueError, match='weights'): merge_adapters(adapters, [1.])
    with pytest.raises(ValueError, match='empty'): merge_adapters([])

def test_adapters_against_peft(clip, tmp_path):
    peft = pytest.importorskip('peft', reason='peft is not installed')
    import copy as c
    for i, options in enumerate((dict(r=3, lora_alpha=5, target_modules=['q_proj', 'fc1']), dict(r=4, use_rslora=True, target_modules=['v_proj', 'token_embedding'], rank_pattern={'layers.1.self_attn.v_proj': 2}))):
        model = peft.get_peft_model(c.deepcopy(clip), peft.LoraConfig(init_lora_weights=False, **options))
        model.save_pretrained(tmp_path/str(i))
        want = {k: v for k, v in model.merge_and_unload().state_dict().items()}
        base = clip.state_dict()
        got = Adapter(tmp_path/str(i)).task_vector(base).apply(base)
        moved = [k for k in base if not torch.equal(want[k], base[k])]
        assert moved and set(moved)==set(Adapter(tmp_path/str(i))) and all(gap(got[k]-base[k], want[k]-base[k])<1e-5 for k in moved)
        again = save_adapter(merge_adapters([Adapter(tmp_path/str(i))]), tmp_path/f'again{i}', Adapter(tmp_path/str(i)).config) if not i else None
        if again:
            loaded = peft.PeftModel.from_pretrained(c.deepcopy(clip), again).merge_and_unload().state_dict()
            assert all(gap(loaded[k]-base[k], want[k]-base[k])<1e-5 for k in moved)

# the hub

def into_cache(folder, repo, cache, commit):
    root = cache/f"models--{repo.replace('/', '--')}"
    for d in ('blobs', 'refs', f'snapshots/{commit}'): (root/d).mkdir(parents=True, exist_ok=True)
    (root/'refs'/'main').write_text(commit)
    for f in folder.iterdir():
        blob = root/'blobs'/sha256(f); blob.write_bytes(f.read_bytes())
        (root/'snapshots'/commit/f.name).symlink_to(os.path.relpath(blob, root/'snapshots'/commit))

def test_ids_keep_the_families_apart():
    base, ids = hub_ids('clip-vit-base-patch16', 20)
    assert base==('openai/clip-vit-base-patch16', None) and len(ids)==20 and ids['sun397']==('tanganke/clip-vit-base-patch16_sun397', None)
    _, old = hub_ids('clip-vit-base-patch16', 8, 'tall_masks')
    assert old['Cars']==('nik-dim/tall_masks', 'single_task/VIT-B-16/CarsVal/nonlinear_finetuned.pt') and not set(old)&set(ids)
    for bad, why in ((('vit', 8), 'name'), (('clip-vit-base-patch32', 0), 'tasks'), (('clip-vit-base-patch32', 21), 'tasks'), (('clip-vit-base-patch32', 8, 'both'), 'family'), (('clip-vit-base-patch32', ['Cars']), 'tasks')):
        with pytest.raises(ValueError, match=why): hub_ids(*bad)

@pytest.fixture
def offline(monkeypatch):
    import huggingface_hub.constants as c
    monkeypatch.setattr(c, 'HF_HUB_OFFLINE', True)

def test_both_families_from_a_cache(clip, tmp_path, offline):
    cache, commit, other = tmp_path/'cache', pinned['openai/clip-vit-base-patch32'], pinned['tanganke/clip-vit-base-patch32_sun397']
    clip.save_pretrained(tmp_path/'base'); into_cache(tmp_path/'base', 'openai/clip-vit-base-patch32', cache, commit)
    base, tower = to_open_clip(clip.state_dict()), image_tower(clip.state_dict())
    tuned = {k: v+torch.randn_like(v) for k, v in clip.state_dict().items()}
    vision = transformers.CLIPVisionModel(clip.config.vision_config)
    vision.load_state_dict({k.removeprefix('vision_model.'): v for k, v in tuned.items() if k.startswith('vision_model.')})
    vision.save_pretrained(tmp_path/'sun'); into_cache(tmp_path/'sun', 'tanganke/clip-vit-base-patch32_sun397', cache, other)
    pool = pool_from_hub(tasks='sun397', cache_dir=cache)
    want = task_vector(tower, image_tower(tuned))
    assert pool.revisions=={'openai/clip-vit-base-patch32': commit, 'tanganke/clip-vit-base-patch32_sun397': other}
    assert all(torch.equal(pool.task_vector('sun397')[k], want[k]) for k in want)
    root = tmp_path/'cache'/'models--nik-dim--tall_masks'; f = root/'snapshots'/commit/'single_task'/'ViT-B-32'/'CarsVal'/'nonlinear_finetuned.pt'
    f.parent.mkdir(parents=True); (root/'refs').mkdir(); (root/'refs'/'main').write_text(commit)
    torch.save({f'model.{k}': v for k, v in to_open_clip(tuned).items()}, f)
    old = pool_from_hub(tasks=['Cars'], family='tall_masks', cache_dir=cache)
    assert all(torch.equal(old.task_vector('Cars')[k], want[k]) for k in want) and set(want)==set(tower)
    assert torch.equal(old.task_vector('Cars')['visual.proj'], (tuned['visual_projection.weight']-clip.state_dict()['visual_projection.weight']).mT) and 'visual.proj' not in pool.base
    with pytest.raises(FileNotFoundError, match='sun397 at deadbeef'): pool_from_hub(tasks='sun397', revisions={'tanganke/clip-vit-base-patch32_sun397': 'deadbeef'}, cache_dir=cache)
    with pytest.raises(FileNotFoundError, match='nik-dim/tall_masks/no.pt'): fetch('nik-dim/tall_masks', 'no.pt', cache_dir=cache)

@pytest.mark.parametrize('number', ['ENOSPC', 'EDQUOT', 'EACCES'])
def test_a_full_disk_is_no_missing_repository(monkeypatch, number):
    import errno, huggingface_hub
    def fail(*args, **kwargs): raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fail)
    with pytest.raises(OSError) as e: fetch('some/repo')
    assert e.value.errno==getattr(errno, number) and not isinstance(e.value, FileNotFoundError)

def test_commits_and_places(clip, tmp_path, offline):
    assert commit_of(Path('/data/snapshots/hub/models--a--b/snapshots/abc/sub/f.pt'))=='abc' and commit_of(Path('/data/hub'))is None
    clip.save_pretrained(tmp_path/'m'); into_cache(tmp_path/'m', 'lab/clip', tmp_path/'cache', 'a'*40)
    for name in ('lab/clip', 'lab/clip@main', f"lab/clip@{'a'*40}"): assert commit_of(locate(name, tmp_path/'cache'))=='a'*40
    for here in (tmp_path/'m', tmp_path/'nothing', './a/b', 'a', 'a/b/c'): assert locate(here, tmp_path/'cache')==Path(here)      # no ids
    for name in ('lab/other', 'lab/clip@v2'):
        with pytest.raises(FileNotFoundError, match=f'{name} does not exist here, and as a repository'): locate(name, tmp_path/'cache')

def test_companions_in_folders(sharded, tmp_path):
    d = copy(sharded, tmp_path/'d')
    for sub, f in (('1_Pooling', 'config.json'), ('2_Dense', 'config.json'), ('2_Dense', 'pytorch_model.bin'), ('logs', 'big'), ('deep/er', 'x')): (d/sub).mkdir(parents=True, exist_ok=True); (d/sub/f).write_bytes(bytes(2**20 if f=='big' else 3))
    assert [str(f.relative_to(d)) for f in Checkpoint(d).companions]==['1_Pooling/config.json', 'config.json']

@pytest.mark.parametrize('name', ['llama', 'gpt2'])
def test_heads_tied_by_the_configuration(tmp_path, name):
    from subspace_nb.stream import merge_files
    made = {'llama': lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=32, max_position_embeddings=16, tie_word_embeddings=True)),
            'gpt2': lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16))}
    torch.manual_seed(0)
    model = made[name]()
    start, states = {k: v.clone() for k, v in model.state_dict().items()}, []
    for i in range(3):
        rng = torch.Generator().manual_seed(i)
        model.load_state_dict({k: v+.01*i*torch.randn(v.shape, generator=rng) if i and v.is_floating_point() else v for k, v in start.items()}); model.tie_weights()
        once, twice = tmp_path/f'once{i}', tmp_path/f'twice{i}'
        model.save_pretrained(once)                                                              # safetensors store the shared tensor once
        twice.mkdir(); torch.save({k: v.clone() for k, v in model.state_dict().items()}, twice/'pytorch_model.bin'); (twice/'config.json').write_bytes((once/'config.json').read_bytes())
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    want = {k: v+.5*sum(s[k]-v for s in states[1:]) if v.is_floating_point() else v for k, v in states[0].items()}
    for j, (b, e) in enumerate([('once', ('once', 'twice')), ('twice', ('once', 'once')), ('once', ('twice', 'twice')), ('twice', ('twice', 'once'))]):
        out = merge_files(tmp_path/f'{b}0', [tmp_path/f'{x}{i+1}' for i, x in enumerate(e)], tmp_path/f'out{j}', alpha=.5, device='cpu')
        got = type(model).from_pretrained(out)
        assert got.get_output_embeddings().weight is got.get_input_embeddings().weight
        for k, v in got.state_dict().items(): assert torch.allclose(v, want[k], atol=1e-6), (b, e, k)

def test_pinned_commits(clip, tmp_path, offline):
    known = {r for m in clip_models for r in ('openai/'+m, *(f'tanganke/{m}_{t}' for t in fusion_bench_tasks))}
    from subspace_nb.published import image_sets
    assert all(re.fullmatch('[0-9a-f]{40}', c) for c in pinned.values()) and len(set(pinned.values()))==len(pinned)
    assert set(pinned)<=known | {i.repo for i in image_sets.values()} | {t5_base} and {'openai/'+m for m in clip_models}<=set(pinned)
    cache, repo = tmp_path/'cache', 'openai/clip-vit-base-patch32'
    clip.save_pretrained(tmp_path/'old'); into_cache(tmp_path/'old', repo, cache, pinned[repo])
    clip.save_pretrained(tmp_path/'new'); into_cache(tmp_path/'new', repo, cache, 'a'*40)                 # where `main` points now
    assert commit_of(fetch(repo, cache_dir=cache))==pinned[repo] and commit_of(fetch(repo, revision='main', cache_dir=cache))=='a'*40
    assert commit_of(locate(repo, cache))==pinned[repo] and commit_of(locate(repo+'@main', cache))=='a'*40

def test_torchscript_is_no_checkpoint(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path/'model.pt'))
    with pytest.raises(ValueError, match='TorchScript program'): read_pickle(tmp_path/'model.pt')

def test_heads():
    encode = lambda ts: torch.tensor([[len(t), 1., t.count('a')] for t in ts])
    head = zero_shot_head(encode, ['cat', 'zebra'], ['a {}', 'photo of a {}.'], 3.)
    rows = encode(['a cat', 'photo of a cat.']); rows = rows/rows.norm(dim=1, keepdim=True)
    assert gap(head[0], 3*rows.mean(0)/rows.mean(0).norm())<1e-6
    for args in ((encode, [], ['a {}']), (encode, ['x'], ['a'])):
        with pytest.raises(ValueError): zero_shot_head(*args)
