"""Published experts, scored: class names, heads, data in the hub's layout, answers by rank, the paper's table."""
import json, os
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

from subspace_nb.experts import Pool, import_open_clip, sha256
from subspace_nb.hub import Checkpoint, families, fetch, image_tower, pinned, t5_tasks, to_open_clip
from subspace_nb.published import (ClipScorer, T5Scorer, View, class_names, class_templates, clip_pool, fetch_data, head_words, held_out, image_columns, image_sets, image_task, load_rows, published,
                                   question_sets, rank_choices, t5_pool, table1, word_f1)
from subspace_nb.tasks import task_vector
import_open_clip()
import transformers
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
COMMIT = '0123456789abcdef0123456789abcdef01234567'

# names and tables

@pytest.mark.parametrize('task, n', {'stanford-cars': 196, 'dtd': 47, 'eurosat': 10, 'gtsrb': 43, 'mnist': 10, 'resisc45': 45, 'svhn': 10, 'sun397': 397, 'stl10': 10, 'oxford-iiit-pet': 37, 'oxford_flowers102': 102, 'cifar100': 100,
                                     'pcam': 2, 'fer2013': 7, 'cifar10': 10, 'food101': 101, 'fashion_mnist': 10, 'rendered-sst2': 2, 'emnist_letters': 26, 'kmnist': 10, 'emnist_digits': 10}.items())
def test_classes(task, n):
    names = class_names[task]
    assert len(names)==len(set(names))==n and all(x==x.strip() and x and '\n' not in x and '  ' not in x for x in names)
    assert class_templates[task] and all(t.count('{}')==1 for t in class_templates[task]) and task in image_sets

def test_tasks_of_both_families():
    for family, tasks in families.items():
        keys = [image_task(t, family) for t in tasks]
        assert len(set(keys))==20 and all(k in image_sets for k in keys)
    assert [image_task(t, 'tall_masks') for t in families['tall_masks'] if t!='EMNIST']==[t for t in families['fusion_bench'] if t!='emnist_letters']
    for args in (('Cars', 'fusion_bench'), ('eurosat', 'tall_masks'), ('Cars', 'both')):
        with pytest.raises(ValueError): image_task(*args)

def test_published_numbers():
    assert len(published)==14*9 and published['TA', 'clip-vit-base-patch32', 20]==60.3 and published['Consensus + boosting + LiNeS', 'clip-vit-large-patch14', 14]==88.8
    assert set(question_sets)==set(t5_tasks['qa'])|set(t5_tasks['nlp'])

# images

@given(st.integers(16, 60), st.integers(16, 60), st.sampled_from(['L', 'RGB', 'RGBA']))
def test_view(w, h, mode):
    image = Image.fromarray(np.full((h, w), 128, np.uint8)).convert(mode)
    x = View(16)(image)
    assert x.shape==(3, 16, 16)
    torch.testing.assert_close(x[:, 5, 5], (128/255-torch.tensor(View.mean))/torch.tensor(View.std))

def test_view_of_a_folder(tmp_path):
    assert View.of(tmp_path)==View()
    for size, want in ((dict(crop_size=48), 48), (dict(crop_size=dict(height=40, width=40)), 40), (dict(size=dict(shortest_edge=32)), 32)):
        (tmp_path/'preprocessor_config.json').write_text(json.dumps(size | dict(image_mean=[.5, .5, .5])))
        assert View.of(tmp_path)==View(want, (.5, .5, .5))

def test_view_is_transformers_own():
    cls = getattr(transformers, 'CLIPImageProcessorPil', None)
    if cls is None: pytest.skip('this transformers has no processor that works with PIL alone')
    rng = np.random.default_rng(0)
    for size in ((300, 400), (230, 224), (50, 90), (224, 224), (123, 7), *rng.integers(8, 700, (40, 2)).tolist()):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        torch.testing.assert_close(View()(image), torch.as_tensor(np.asarray(cls()(image)['pixel_values'][0])), rtol=1e-3, atol=1e-3)

def test_validation_examples():
    assert held_out(100)==torch.utils.data.random_split(range(100), [90, 10], torch.Generator().manual_seed(0))[1].indices and len(held_out(10**6))==5000

# a hub cache with models and data

def into_cache(folder, repo, cache, kind='models'):
    root, commit = cache/f"{kind}--{repo.replace('/', '--')}", pinned.get(repo, COMMIT)
    for d in ('blobs', 'refs'): (root/d).mkdir(parents=True, exist_ok=True)
    (root/'refs'/'main').write_text(commit)
    for f in (f for f in folder.rglob('*') if f.is_file()):
        blob, link = root/'blobs'/sha256(f), root/'snapshots'/commit/f.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True); blob.write_bytes(f.read_bytes()); link.symlink_to(os.path.relpath(blob, link.parent))

def letters(folder):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    t = Tokenizer(models.WordLevel({chr(i): i for i in range(128)} | {'<s>': 128, '</s>': 129}, unk_token='?'))
    t.pre_tokenizer = pre_tokenizers.Split(Regex('.'), 'isolated')
    t.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 128), ('</s>', 129)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>', pad_token='</s>', unk_token='?').save_pretrained(folder)

@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    datasets = pytest.importorskip('datasets', reason='datasets is not installed (pip install datasets)')
    root = tmp_path_factory.mktemp('hub'); cache = root/'cache'
    torch.manual_seed(0)
    clip = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=16, text_config=dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=130, max_position_embeddings=77, bos_token_id=128, eos_token_id=129, pad_token_id=129),
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8))).eval()
    clip.save_pretrained(root/'base'); letters(root/'base')
    (root/'base'/'preprocessor_config.json').write_text('{"crop_size": 16}')
    into_cache(root/'base', 'openai/clip-vit-base-patch32', cache)
    tuned = {}
    for i, t in enumerate(('rendered-sst2', 'fer2013')):
        rng = torch.Generator().manual_seed(i)
        tuned[t] = {k: v+.1*torch.randn(v.shape, generator=rng) for k, v in clip.state_dict().items()}
        tower = transformers.CLIPVisionModel(clip.config.vision_config)
        tower.load_state_dict({k.removeprefix('vision_model.'): v for k, v in tuned[t].items() if k.startswith('vision_model.')})
        tower.save_pretrained(root/t); into_cache(root/t, f'tanganke/clip-vit-base-patch32_{t}', cache)
    folder = root/'tall'/'single_task'/'ViT-B-32'/'RenderedSST2Val'; folder.mkdir(parents=True)
    torch.save({f'model.{k}': v for k, v in to_open_clip(tuned['rendered-sst2']).items()}, folder/'nonlinear_finetuned.pt')
    into_cache(root/'tall', 'nik-dim/tall_masks', cache)
    rng = np.random.default_rng(0)
    for t, n, column in (('rendered-sst2', 2, 'label'), ('fer2013', 7, 'cls')):
        features = datasets.Features({'image': datasets.Image(), column: datasets.ClassLabel(num_classes=n), 'other': datasets.Value('string')})
        for split, m in (('train', 30), ('test', 11)):
            (root/f'{t}-data'/'data').mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict({'image': [Image.fromarray(rng.integers(0, 256, (18, 21, 3), dtype=np.uint8)) for _ in range(m)], column: rng.integers(0, n, m).tolist(), 'other': ['x']*m}, features) \
                .to_parquet(root/f'{t}-data'/'data'/f'{split}-00000-of-00001.parquet')
        into_cache(root/f'{t}-data', image_sets[t].repo, cache, 'datasets')
    return cache, clip, tuned

@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants as c
    monkeypatch.setattr(c, 'HF_HUB_OFFLINE', True)

def test_pool_from_hub_end_to_end(cache):
    folder, clip, tuned = cache
    pool = Pool.from_hub('clip-vit-base-patch32', ['rendered-sst2', 'fer2013'], cache_dir=folder, device='cpu', batch=4)
    rows = pool.scorer.rows('fer2013', 'test')
    assert image_columns(rows)==('image', 'cls') and len(rows)==11 and len(pool.scorer.rows('fer2013', 'val'))==3
    head, clip_t = pool.scorer.head('fer2013'), transformers.CLIPModel(clip.config).eval()
    clip_t.load_state_dict(clip.state_dict() | {k: v for k, v in tuned['fer2013'].items() if k.startswith('vision_model.')})       # by hand: the expert's tower, the base's words and projections
    tokenizer = transformers.AutoTokenizer.from_pretrained(pool.scorer.folder)
    with torch.no_grad():
        features = lambda out: out if isinstance(out, torch.Tensor) else out.pooler_output
        x = torch.stack([View(16)(r['image']) for r in rows])
        for c, name in enumerate(class_names['fer2013']):
            w = [features(clip.get_text_features(**{k: v for k, v in tokenizer(t.format(name), return_tensors='pt').items() if k!='token_type_ids'}))[0] for t in class_templates['fer2013']]
            mean = sum(v/v.norm() for v in w)
            torch.testing.assert_close(head[c], clip.logit_scale.exp()*mean/mean.norm(), rtol=1e-3, atol=1e-3)
        said = (features(clip_t.get_image_features(pixel_values=x))@head.T).argmax(1)
    right = sum(int(a)==r['cls'] for a, r in zip(said, rows))/11
    table = pool.evaluate(pool.expert('fer2013'))
    assert abs(table.loc['fer2013', 'accuracy']-right)<1e-9 and abs(table.loc['fer2013', 'normalised']-1)<1e-9
    assert pool.revisions=={r: pinned.get(r, COMMIT) for r in ('openai/clip-vit-base-patch32', 'tanganke/clip-vit-base-patch32_rendered-sst2', 'tanganke/clip-vit-base-patch32_fer2013', 'nateraw/rendered-sst2', 'clip-benchmark/wds_fer2013')}

def test_the_other_family_and_your_own_function(cache):
    folder, clip, tuned = cache
    pool, own = clip_pool(tasks=['RenderedSST2'], family='tall_masks', cache_dir=folder, device='cpu'), tuned['rendered-sst2']
    want = task_vector(image_tower(clip.state_dict(), proj=True), image_tower(own, proj=True))
    assert 'visual.proj' in want and set(pool.task_vector('RenderedSST2'))==set(want) and all(torch.equal(pool.task_vector('RenderedSST2')[k], want[k]) for k in want)
    by_hand = transformers.CLIPModel(clip.config).eval()                                        # all that was trained: the tower and the projection behind it
    by_hand.load_state_dict(clip.state_dict() | {k: v for k, v in own.items() if k.startswith('vision_model.') or k=='visual_projection.weight'})
    rows, head = pool.scorer.rows('RenderedSST2', 'test'), pool.scorer.head('RenderedSST2')
    with torch.no_grad(): f = by_hand.get_image_features(pixel_values=torch.stack([pool.scorer.view(r['image']) for r in rows]))
    right = ((f if isinstance(f, torch.Tensor) else f.pooler_output)@head.mT).argmax(1)==torch.tensor([r['label'] for r in rows])
    assert pool.evaluate(pool.expert('RenderedSST2')).loc['mean', 'accuracy']==pytest.approx(right.float().mean().item(), abs=1e-4)
    mine = clip_pool(tasks=['rendered-sst2'], cache_dir=folder, device='cpu', evaluate=lambda state, task, split: .5)
    assert mine.evaluate(mine.base).loc['mean', 'accuracy']==.5 and not hasattr(mine, 'scorer')

def test_heads_of_the_two_families():
    for task in families['fusion_bench']: assert head_words(task, 'fusion_bench')==(class_names[image_task(task, 'fusion_bench')], class_templates[image_task(task, 'fusion_bench')])
    for task in families['tall_masks']:
        names, templates = head_words(task, 'tall_masks')
        assert len(names)==len(class_names[image_task(task, 'tall_masks')]) and len(set(names))==len(names) and templates
    assert head_words('KMNIST', 'tall_masks')[0][:3]==['o', 'ki', 'su'] and "['happy', 'smiling']" in head_words('FER2013', 'tall_masks')[0]
    assert not any('_' in n for n in head_words('OxfordIIITPet', 'tall_masks')[0]) and 'apple_pie' in head_words('Food101', 'tall_masks')[0]

@pytest.mark.parametrize('start', ['fork', 'spawn'])
def test_images_are_read_by_workers(cache, start):
    import multiprocessing
    folder, _, _ = cache
    accuracy = lambda **kw: (lambda pool: pool.evaluate(pool.base).loc['mean', 'accuracy'])(clip_pool(tasks=['rendered-sst2'], cache_dir=folder, device='cpu', **kw))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(start, force=True)
    try: assert accuracy(workers=2)==accuracy()
    finally: multiprocessing.set_start_method(before, force=True)

def test_data_as_the_hub_converts_it(tmp_path):
    import datasets
    for split in ('train', 'test'):
        (tmp_path/'quartz'/split).mkdir(parents=True)
        datasets.Dataset.from_dict(dict(question=[split]*3, label=[0, 1, 0])).to_parquet(tmp_path/'quartz'/split/'0000.parquet')
    assert load_rows(tmp_path, 'test', 'quartz')['question']==['test']*3

def test_scorer_refusals_and_limits(cache):
    folder, clip, _ = cache
    pool = clip_pool(tasks=['rendered-sst2'], cache_dir=folder, device='cpu', limit=5)
    assert len(pool.scorer.rows('rendered-sst2', 'test'))==5
    with pytest.raises((ValueError, KeyError)): pool.scorer(pool.base | {'visual.extra': torch.ones(1)}, 'rendered-sst2')
    with pytest.raises(FileNotFoundError, match='tanganke/dtd'): ClipScorer(pool.scorer.folder, cache_dir=folder, device='cpu').rows('dtd', 'test')
    with pytest.raises(FileNotFoundError, match='deadbeef'): fetch_data('nateraw/rendered-sst2', 'deadbeef', cache_dir=folder)
    at = fetch_data('nateraw/rendered-sst2', cache_dir=folder)
    with pytest.raises(ValueError, match='no split dev'): load_rows(at, 'dev', cache_dir=folder/'prepared')
    with pytest.raises(FileNotFoundError): load_rows(folder/'nothing', 'test')
    with pytest.raises(ValueError, match='a column of images'): image_columns(load_rows(at, 'test', cache_dir=folder/'prepared').remove_columns('label'))
    local = ClipScorer(pool.scorer.folder, data={'dtd': at}, cache_dir=folder, device='cpu')
    assert len(local.rows('dtd', 'test'))==11 and not local.used

def test_table1(cache):
    folder, _, _ = cache
    pool = clip_pool(tasks=['rendered-sst2', 'fer2013'], cache_dir=folder, device='cpu')
    seen = []
    t = table1(pool, 'clip-vit-base-patch16', 14, ['Zero-shot', 'Fine-tuned', 'TIES + boosting'], grid=(.5, 1.), keep=.3, report=lambda r, x: seen.append(r))
    assert list(t.index)==seen and set(t.tasks)=={2} and t.published.tolist()==[61.4, 91.6, 80.5] and (t.difference-(t.ours-t.published)).abs().max()<.06
    assert abs(t.ours['Zero-shot']-100*pool.evaluate(pool.base).loc['mean', 'accuracy'])<.06
    for bad in (dict(model='vit', n=8), dict(model='clip-vit-base-patch32', n=9), dict(model='clip-vit-base-patch32', n=8, rows=['x'])):
        with pytest.raises(ValueError): table1(pool, **bad)

# language

EXAMPLES = {'cosmos_qa': dict(context='c', question='q', answer0='a', answer1='b', answer2='c', answer3='d', label=2), 'social_iqa': dict(context='c', question='q', answerA='a', answerB='b', answerC='c', label='2'),
    'paws': dict(sentence1='a', sentence2='b', label=1), 'quail': dict(context='c', question='q', answers=['a', 'b', 'c', 'd'], correct_answer_id=3), 'wiki_qa': dict(question='q', answer='a', label=0),
    'quartz': dict(para='p', question='q', choices=dict(text=['x', 'y'], label=['A', 'B']), answerKey='B'), 'qasc': dict(combinedfact='f', question='q', choices=dict(text=list('abcdefgh'), label=list('ABCDEFGH')), answerKey='C'),
    'ropes': dict(background='b', situation='s', question='q', answers=dict(text=['red ice'])), 'story_cloze': dict(input_sentence_1='1', input_sentence_2='2', input_sentence_3='3', input_sentence_4='4', sentence_quiz1='x', sentence_quiz2='y', answer_right_ending=2),
    'winogrande': dict(sentence='the _ fits', option1='a', option2='b', answer='1'), 'wsc': dict(text='t', span1_text='Ann', span2_text='she', label=1)}
RIGHT = {'cosmos_qa': 2, 'social_iqa': 1, 'paws': 1, 'quail': 3, 'wiki_qa': 0, 'quartz': 1, 'qasc': 2, 'ropes': ['red ice'], 'story_cloze': 1, 'winogrande': 0, 'wsc': 1}

@pytest.mark.parametrize('task', question_sets)
def test_prompts(task):
    text, choices, right = question_sets[task].prompt(EXAMPLES[task])
    assert isinstance(text, str) and right==RIGHT[task] and (choices is None)==(task=='ropes') and (choices is None or 0<=right<len(choices))

def test_words_in_common():
    assert word_f1('the cat', ['A cat!'])==1 and word_f1('dog', ['cat', 'big dog'])==2/3 and word_f1('', ['the'])==1 and word_f1('x', ['y'])==0

def words(folder, text):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['<pad>', '</s>', '<unk>', *sorted(set(text))])}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token='</s>', pad_token='<pad>', unk_token='<unk>').save_pretrained(folder)

@pytest.fixture(scope='module')
def t5(tmp_path_factory):
    root = tmp_path_factory.mktemp('t5')
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, vocab_size=40, dropout_rate=0., decoder_start_token_id=0)).eval()
    model.save_pretrained(root/'base'); words(root/'base', 'a b c d e f g h p q s x y red ice Question No Yes'.split())
    for i, t in enumerate(('quartz', 'ropes')):
        expert = transformers.T5ForConditionalGeneration(model.config); expert.load_state_dict(model.state_dict()); torch.manual_seed(i)
        with torch.no_grad(): [p.add_(.05*torch.randn_like(p)) for p in expert.parameters()]
        expert.save_pretrained(root/t)
    return root, model

def test_scores_are_log_probabilities(t5):
    root, model = t5
    tokenizer = transformers.AutoTokenizer.from_pretrained(root/'base')
    texts, choices = ['a b c Question q', 'p'], [['x', 'red ice y', 'No'], ['Yes', 'a b']]
    for per_token in (True, False):
        got = rank_choices(model, tokenizer, texts, choices, per_token)
        for text, cs, s in zip(texts, choices, got):
            assert len(s)==len(cs)
            for c, v in zip(cs, s):
                y = tokenizer(c, return_tensors='pt')['input_ids']
                torch.testing.assert_close(v, -model(**tokenizer(text, return_tensors='pt'), labels=y).loss.detach()*(1 if per_token else y.shape[1]), rtol=1e-4, atol=1e-4)

def test_t5_pool_end_to_end(t5, tmp_path):
    datasets = pytest.importorskip('datasets', reason='datasets is not installed (pip install datasets)')
    root, model = t5
    cache = tmp_path/'cache'
    rows = {'quartz': [EXAMPLES['quartz'] | dict(answerKey=k, question=q) for k, q in (('A', 'a'), ('B', 'b'), ('A', 'c'))], 'ropes': [EXAMPLES['ropes']]}
    for t, es in rows.items():
        for split in ('train', 'validation'): (tmp_path/t/'data').mkdir(parents=True, exist_ok=True); datasets.Dataset.from_list(es).to_parquet(tmp_path/t/'data'/f'{split}-00000-of-00001.parquet')
        into_cache(tmp_path/t, question_sets[t].repo, cache, 'datasets')
    pool = t5_pool(root/'base', {t: root/t for t in rows}, device='cpu', cache_dir=cache, batch=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(root/'base')
    hits = 0
    for e in rows['quartz']:
        text, cs, r = question_sets['quartz'].prompt(e)
        hits += int(rank_choices(model, tokenizer, [text], [cs])[0].argmax())==r
    table = pool.evaluate(pool.base)
    assert abs(table.loc['quartz', 'accuracy']-hits/3)<1e-9 and 0<=table.loc['ropes', 'accuracy']<=1
    mine = t5_pool(root/'base', {'quartz': root/'quartz'}, device='cpu', cache_dir=cache, prompt={'quartz': lambda e: ('p', ['x', 'x y'], 0)}, per_token=False)
    assert mine.evaluate(mine.base).loc['quartz', 'accuracy']==1                                     # the sum never prefers the longer of two that begin alike
    for n in ('base', 'quartz'): into_cache(root/n, f'lab/t5-{n}', cache)
    hubbed = t5_pool('lab/t5-base', {'quartz': 'lab/t5-quartz'}, device='cpu', cache_dir=cache, batch=2)
    assert hubbed.evaluate(hubbed.base).loc['quartz', 'accuracy']==table.loc['quartz', 'accuracy']
    assert all(torch.equal(hubbed.task_vector('quartz')[k], pool.task_vector('quartz')[k]) for k in pool.base)
    with pytest.raises(FileNotFoundError, match='lab/t5-ropes does not exist here'): t5_pool('lab/t5-base', {'ropes': 'lab/t5-ropes'}, device='cpu', cache_dir=cache)
    with pytest.raises(ValueError, match='poems'): t5_pool(root/'base', {'poems': root/'quartz'})
    with pytest.raises(ValueError, match='task must be'): T5Scorer(root/'base').rows('poems', 'test')
    with pytest.raises(ValueError, match='unexpected|has not'): T5Scorer(root/'base', device='cpu', cache_dir=cache)(dict(model.state_dict()) | {'x': torch.ones(1)}, 'quartz')
