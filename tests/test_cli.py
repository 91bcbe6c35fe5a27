"""The command: every verb, exit codes, files of options, errors without tracebacks."""
import json, os, re, signal, subprocess, sys, time
import pytest
import torch
from safetensors.torch import save_file

from subspace_nb.alignment import alignment_matrix
from subspace_nb.cli import align_files, all_options, expert_names, layer_ranks, main, parser
from subspace_nb.hub import Checkpoint
from subspace_nb.merge import task_arithmetic, ties
from subspace_nb.rivals import knots
from subspace_nb.spectra import stable_rank
from subspace_nb.stream import partial_folder
from subspace_nb.tasks import task_vector

SHAPES = {'head.weight': (3, 8), 'ln.bias': (8,), **{f'blocks.{l}.{k}.weight': s for l in range(2) for k, s in {'attn.qkv': (24, 8), 'attn.proj': (8, 8), 'mlp.fc1': (16, 8)}.items()}}

def folder(path, state):
    path.mkdir()
    save_file(state, path/'model.safetensors', metadata={'format': 'pt'})
    (path/'config.json').write_text('{}')

@pytest.fixture
def models(tmp_path, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    draw = lambda: {k: torch.randn(s, generator=rng) for k, s in SHAPES.items()}
    states = {'base': draw()}
    for n in ('one', 'two', 'three'): states[n] = {k: states['base'][k]+.1*w for k, w in draw().items()}
    for n, s in states.items(): folder(tmp_path/n, s)
    monkeypatch.chdir(tmp_path)
    return states

EXPERTS = ['--base', 'base', '--expert', 'one', '--expert', 'two', '--expert', 'three', '--quiet']

def call(capsys, *argv):
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err

def merged(path, want): # bit for bit
    got = Checkpoint(path)
    return set(got)==set(want) and all(torch.equal(got[k], want[k]) for k in want)

def test_merge(models, capsys):
    taus = [task_vector(models['base'], models[n]) for n in ('one', 'two', 'three')]
    code, out, err = call(capsys, 'merge', *EXPERTS, '--method', 'ties', '--keep', '0.3', '--alpha', '0.7', '--out', 'out', '--device', 'cpu')
    assert code==0 and out.startswith('out: 3 experts merged by ties') and not err and merged('out', ties(taus, .3).apply(models['base'], .7))
    code, out, _ = call(capsys, 'merge', *EXPERTS, '--out', 'out', '--overwrite', '--json', '--alpha', '.2')
    assert code==0 and json.loads(out)['report']['alpha']==.2 and merged('out', task_arithmetic(taus).apply(models['base'], .2))

def test_progress(models, capsys):
    flags = [f for f in EXPERTS if f!='--quiet']
    code, out, err = call(capsys, 'merge', *flags, '--out', 'out', '--method', 'ties')
    assert code==0 and all(step in err for step in ('hashes', 'thresholds', 'signs', 'merge')) and 'hashes' not in out

def test_merge_in_processes(models, capsys):
    taus = [task_vector(models['base'], models[n]) for n in ('one', 'two', 'three')]
    assert call(capsys, 'merge', *EXPERTS, '--out', 'out', '--workers', '2')[0]==0
    assert merged('out', task_arithmetic(taus).apply(models['base']))

@pytest.mark.parametrize('flags', [['--boost', '0'], ['--boost', '0.1', '--attention', 'full_attn'], ['--slope', '0.5'], ['--slope', '0.5', '--start', '0.1', '--boost', '0.0'], ['--boost', 'none'],
                                   ['--method', 'consensus', '--agree', '3'], ['--method', 'dare', '--drop', '.9', '--seed', '4'], ['--method', 'iso_cts', '--common', '.5', '--skip', 'head'], ['--no-join', '--method', 'iso_c']])
def test_flags_reach_the_merge(models, capsys, flags):
    code, out, err = call(capsys, 'merge', *EXPERTS, '--out', 'out', '--json', *flags)
    report = json.loads(out)['report']
    said = dict(zip([f for f in flags if f.startswith('--')], [f for f in flags if not f.startswith('--')]))
    flat = report | report['options'] | {'boost': report['beta']}
    for k, v in said.items():
        if k!='--no-join': assert str(flat[k[2:]]) in (v, str(float(v)) if re.match(r'[\d.]+$', v) else '', v.title())
    if '--no-join' in flags: assert report['join'] is False

def test_options_of_all_methods_are_flags():
    known = {s for a in parser()._subparsers._group_actions[0].choices['merge']._actions for s in a.option_strings}
    assert {f'--{k}' for k in all_options}<=known

def test_yaml_and_precedence(models, tmp_path, capsys):
    (tmp_path/'c.yml').write_text('base: base\nexperts: [one, two]\nmethod: ties\nkeep: 0.4\nalpha: 0.9\nboost: 0.0\n')
    code, out, _ = call(capsys, 'merge', '--config', 'c.yml', '--out', 'out', '--alpha', '0.5', '--json', '--quiet')
    report = json.loads(out)['report']
    assert code==0 and (report['alpha'], report['beta'], report['method'], report['options'], len(report['experts']))==(.5, 0, 'ties', {'keep': .4}, 2)

def test_none_takes_back_what_a_file_says(models, tmp_path, capsys):
    (tmp_path/'c.yml').write_text('base: base\nexperts: [one, two]\nboost: 0.0\nslope: 0.3\nrank_tol: 0.1\n')
    read = lambda *flags: json.loads(call(capsys, 'merge', '--config', 'c.yml', '--out', 'out', '--overwrite', '--json', '--quiet', *flags)[1])['report']
    assert [read()[k] for k in ('beta', 'slope', 'rank_tol')]==[0, .3, .1]
    said = read('--boost', 'none', '--slope', 'none')
    assert [said[k] for k in ('beta', 'slope', 'rank_tol')]==[None, None, .1]
    taus = [task_vector(models['base'], models[n]) for n in ('one', 'two')]
    assert merged('out', task_arithmetic(taus).apply(models['base']))

def test_knots(models, capsys):
    taus = [task_vector(models['base'], models[n]) for n in ('one', 'two', 'three')]
    assert call(capsys, 'merge', *EXPERTS, '--out', 'out', '--method', 'knots', '--keep', '.3', '--alpha', '.5', '--device', 'cpu')[0]==0
    assert merged('out', knots(taus, lambda t: ties(t, .3), device='cpu').apply(models['base'], .5))

KIT = '''
merge_method: {method}
base_model: base
models:
  - model: base
  - model: one
    parameters: {{weight: 0.5}}
  - model: two
    parameters: {{weight: 0.5}}
{more}
'''

@pytest.mark.parametrize('method, more, alpha', [('task_arithmetic', '', .5), ('task_arithmetic', 'parameters: {lambda: 0.4}', .2), ('task_arithmetic', 'parameters: {normalize: true}', .5),
                                                 ('task_arithmetic', 'parameters: {normalize: true, lambda: 3.0, int8_mask: true}\ndtype: float32\ntokenizer_source: base', 1.5)])
def test_mergekit_files(models, tmp_path, capsys, method, more, alpha):
    (tmp_path/'k.yml').write_text(KIT.format(method=method, more=more))
    assert call(capsys, 'merge', '--config', 'k.yml', '--out', 'out', '--quiet')[0]==0
    want = task_arithmetic([task_vector(models['base'], models[n]) for n in ('one', 'two')]).apply(models['base'], alpha)
    if 'normalize' not in more: assert merged('out', want)
    for k, v in Checkpoint('out').items(): torch.testing.assert_close(v, want[k])

def test_mergekit_linear_is_the_weighted_mean_of_all_models(models, tmp_path, capsys):
    (tmp_path/'k.yml').write_text(KIT.format(method='linear', more='parameters: {weight: 1.0}'))
    assert call(capsys, 'merge', '--config', 'k.yml', '--out', 'out', '--quiet')[0]==0
    for k, v in Checkpoint('out').items(): torch.testing.assert_close(v, (models['base'][k]+.5*models['one'][k]+.5*models['two'][k])/2)
    (tmp_path/'k.yml').write_text('merge_method: linear\nmodels: [{model: one}, {model: three}]\nparameters: {weight: 0.7}')           # no base is named
    assert call(capsys, 'merge', '--config', 'k.yml', '--out', 'out', '--quiet', '--overwrite')[0]==0
    for k, v in Checkpoint('out').items(): torch.testing.assert_close(v, (models['one'][k]+models['three'][k])/2)

def test_mergekit_ids_of_the_hub(models, tmp_path, capsys, monkeypatch):
    import huggingface_hub.constants as c
    monkeypatch.setattr(c, 'HF_HUB_OFFLINE', True); monkeypatch.setattr(c, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    for n, commit in (('base', 'a'*40), ('one', 'b'*40), ('two', 'c'*40)):
        root = tmp_path/'cache'/f'models--some-lab--{n}'
        (root/'snapshots').mkdir(parents=True); (root/'refs').mkdir(); (root/'refs'/'main').write_text(commit)
        (tmp_path/n).rename(root/'snapshots'/commit)
    (tmp_path/'k.yml').write_text(KIT.format(method='task_arithmetic', more='').replace('base_model: base', 'base_model: some-lab/base').replace('model: base', 'model: some-lab/base').replace(': one', ': some-lab/one').replace(': two', f": some-lab/two@{'c'*40}"))
    code, _, err = call(capsys, 'merge', '--config', 'k.yml', '--out', 'out', '--quiet')
    assert code==0, err
    assert merged('out', task_arithmetic([task_vector(models['base'], models[n]) for n in ('one', 'two')]).apply(models['base'], .5))
    (tmp_path/'k.yml').write_text(KIT.format(method='task_arithmetic', more='').replace(': one', ': some-lab/nothing'))
    code, _, err = call(capsys, 'merge', '--config', 'k.yml', '--out', 'other', '--quiet')
    assert code==1 and 'some-lab/nothing does not exist here, and as a repository of the hub' in err

def test_mergekit_types(models, tmp_path, capsys):
    (tmp_path/'base'/'config.json').write_text('{"torch_dtype": "float32"}')
    (tmp_path/'k.yml').write_text(KIT.format(method='ties', more='parameters: {density: 0.5}\ndtype: bfloat16'))
    assert call(capsys, 'merge', '--config', 'k.yml', '--out', 'out', '--quiet')[0]==0
    assert set(Checkpoint('out').dtypes.values())=={torch.bfloat16} and json.loads((tmp_path/'out'/'config.json').read_text())=={'torch_dtype': 'bfloat16'}
    (tmp_path/'k.yml').write_text(KIT.format(method='ties', more='parameters: {density: 0.5}\ndtype: float32\nout_dtype: float16'))
    assert call(capsys, 'merge', '--config', 'k.yml', '--out', 'out', '--quiet', '--overwrite')[0]==0
    assert set(Checkpoint('out').dtypes.values())=={torch.float16}

def test_mergekit_dare(models, tmp_path, capsys):
    text = KIT.format(method='METHOD', more='parameters: {density: DENSITY, rescale: RESCALE}')
    def run(method, density, rescale='false'):
        (tmp_path/'k.yml').write_text(text.replace('METHOD', method).replace('DENSITY', str(density)).replace('RESCALE', rescale))
        code, _, err = call(capsys, 'merge', '--config', 'k.yml', '--out', 'out', '--quiet', '--overwrite')
        assert code==0, err
        return dict(Checkpoint('out'))
    taus = [task_vector(models['base'], models[n]) for n in ('one', 'two')]
    want = task_arithmetic(taus).apply(models['base'], .5)
    for k, v in run('dare_linear', 1.).items(): torch.testing.assert_close(v, want[k])                    # nothing is dropped
    half, again = run('dare_linear', .5), run('dare_linear', .5)
    k = 'blocks.1.attn.qkv.weight'
    x, parts = (half[k]-models['base'][k])/.5, [torch.zeros_like(taus[0][k]), taus[0][k], taus[1][k], taus[0][k]+taus[1][k]]
    which = torch.stack([(x-p).abs()<1e-5 for p in parts])
    assert which.any(0).all() and (which.float().mean((1, 2))-.25).abs().max()<.1 and torch.equal(half[k], again[k])   # each expert's entries stay with probability 1/2
    (tmp_path/'one.yml').write_text('merge_method: dare_linear\nbase_model: base\nmodels: [{model: one, parameters: {weight: 1}}]\nparameters: {density: 0.3}')
    assert call(capsys, 'merge', '--config', 'one.yml', '--out', 'one-out', '--quiet')[0]==0
    for k, v in Checkpoint('one-out').items(): assert abs((v-models['base'][k]).abs().sum()/taus[0][k].abs().sum()-1)<1e-4 or not (v-models['base'][k]).any()   # rescaled to the L1 norm

@pytest.mark.parametrize('text, why', [
    ('', 'must hold keys'), ('- 1', 'must hold keys'), ('a: [', 'not YAML'), ('a: 1\nb: 2', 'a, b'), ('experts: 3', 'list of paths'), (KIT.format(method='slerp', more=''), 'merge_method slerp is not known'),
    (KIT.format(method='della', more=''), 'della'), (KIT.format(method='task_arithmetic', more='dtype: int8'), 'dtype must be'), (KIT.format(method='task_arithmetic', more='tokenizer_source: union'), 'tokenizer_source'),
    (KIT.format(method='task_arithmetic', more='parameters: {t: 0.5}'), 'not known: t'), (KIT.format(method='linear', more='parameters: {normalize: false}'), 'normalize: false'), ('merge_method: task_arithmetic\nmodels: [{model: one}]', 'base_model'),
    (KIT.format(method='linear', more=''), 'weight is missing for the base'), ('merge_method: ties\nbase_model: base\nmodels: [{model: one}]', 'weight is missing'),
    ('merge_method: ties\nbase_model: base\nmodels: [{model: one, parameters: {weight: {filter: mlp, value: 1}}}]', 'no filter fits'), ('merge_method: ties\nbase_model: base\nmodels: [{model: one, parameters: {weight: {filter: mlp}}}]', 'conditions need'),
    (KIT.format(method='ties', more='chat_template: auto'), 'chat_template'), (KIT.format(method='ties', more='parameters: {normalize: 2}'), 'normalize must be true or false'), (KIT.format(method='model_stock', more=''), 'model_stock takes no parameters'),
    ('merge_method: ties\nbase_model: base\nmodels: [{model: one, weight: 2}]', 'keys of a model'),
    ('merge_method: task_arithmetic\nbase_model: base', 'models must be'), (KIT.format(method='task_arithmetic', more='parameters: {lambda: x}'), 'lambda must be a number'), (KIT.format(method='task_arithmetic', more='slices: []'), 'slices'),
    ('merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one, parameters: {weight: [1, x]}}]', 'conditions need'), ('workers: 0\nbase: base\nexpert: one\nout: x', 'workers'), ('base: base\nexpert: one\nout: x\nalpha: high', 'alpha')])
def test_files_refused(models, tmp_path, capsys, text, why):
    (tmp_path/'c.yml').write_text(text)
    code, out, err = call(capsys, 'merge', '--config', 'c.yml', '--out', 'out', '--quiet')
    assert code==1 and not out and why in err and err.startswith('subspace-nb: error: ') and 'Traceback' not in err and not (tmp_path/'out').exists()

def test_inspect(models, capsys):
    table = layer_ranks('base', ['one', 'two', 'three'])
    taus = [task_vector(models['base'], models[n]) for n in ('one', 'two', 'three')]
    assert list(table.columns)==['layer', 'block', 'component', 'one', 'two', 'three', 'sum'] and len(table)==2*5
    row = table.set_index('layer').loc['blocks.1.mlp.fc1.weight']
    assert abs(row['sum']-float(stable_rank(sum(taus)['blocks.1.mlp.fc1.weight'])))<2e-3 and abs(row.two-float(stable_rank(taus[1]['blocks.1.mlp.fc1.weight'])))<2e-3
    code, out, _ = call(capsys, 'inspect', *EXPERTS)
    assert code==0 and 'blocks.0.attn.qkv.weight[k]' in out and 'mean' in out
    code, out, _ = call(capsys, 'inspect', *EXPERTS, '--json')
    assert len(json.loads(out)['layers'])==10
    code, out, _ = call(capsys, 'inspect', 'base', '--json')
    data = json.loads(out)
    assert data['layout']=='timm ViT' and data['parameters']=={'float32': sum(v.numel() for v in models['base'].values())} and data['blocks']=={'blocks': 2}

def test_names_that_tell_experts_apart(models, tmp_path, capsys):
    for new, old in (('Qwen2.5-math', 'one'), ('Qwen2.5-code', 'two'), ('run/sum', 'three')): (tmp_path/new).parent.mkdir(exist_ok=True); (tmp_path/old).rename(tmp_path/new)
    assert list(layer_ranks('base', ['Qwen2.5-math', 'Qwen2.5-code']).columns)==['layer', 'block', 'component', 'Qwen2.5-math', 'Qwen2.5-code', 'sum']
    taus = [task_vector(models['base'], models[n]) for n in ('one', 'three')]
    here = tmp_path.name
    table = layer_ranks('base', ['Qwen2.5-math', 'run/sum']).set_index('layer')                             # "sum" is a column already
    assert list(table.columns)==['block', 'component', f'{here}/Qwen2.5-math', 'run/sum', 'sum']
    k = 'blocks.1.mlp.fc1.weight'
    assert abs(table.loc[k, 'run/sum']-float(stable_rank(taus[1][k])))<2e-3 and abs(table.loc[k, 'sum']-float(stable_rank(sum(taus)[k])))<2e-3
    (tmp_path/'other').mkdir(); (tmp_path/'run'/'sum').rename(tmp_path/'other'/'Qwen2.5-math')
    flags = ['--base', 'base', '--expert', 'Qwen2.5-math', '--expert', 'Qwen2.5-code', '--expert', 'other/Qwen2.5-math', '--quiet', '--json']
    assert json.loads(call(capsys, 'align', *flags)[1])['experts']==[f'{here}/Qwen2.5-math', f'{here}/Qwen2.5-code', 'other/Qwen2.5-math']
    picked = json.loads(call(capsys, 'select', *flags, '--k', '1', '--pool', 'other/Qwen2.5-math')[1])['picked']
    assert picked in ([f'{here}/Qwen2.5-math'], [f'{here}/Qwen2.5-code'])
    assert expert_names(['a/x.safetensors', 'b/y.safetensors'])==['x', 'y'] and expert_names(['sum.pt'])==[f'{here}/sum']
    with pytest.raises(ValueError, match='twice'): expert_names(['a', './a'])

def test_inspect_an_adapter(tmp_path, capsys):
    (tmp_path/'a').mkdir()
    save_file({'base_model.model.x.lora_A.weight': torch.ones(2, 3), 'base_model.model.x.lora_B.weight': torch.ones(4, 2)}, tmp_path/'a'/'adapter_model.safetensors')
    (tmp_path/'a'/'adapter_config.json').write_text('{"r": 2, "lora_alpha": 2}')
    assert 'LoRA adapter' in call(capsys, 'inspect', str(tmp_path/'a'))[1]

def test_align_and_select(models, tmp_path, capsys):
    taus = [task_vector(models['base'], models[n]) for n in ('one', 'two', 'three')]
    matrix, names, used, left_out = align_files('base', ['one', 'two', 'three'])
    want = alignment_matrix([type(t)({k: v for k, v in t.items()}) for t in taus])
    torch.testing.assert_close(matrix, want)
    assert names==['one', 'two', 'three'] and (used, left_out)==(10, 0)
    code, out, _ = call(capsys, 'align', *EXPERTS, '--json', '--plot', 'a.png')
    torch.testing.assert_close(torch.tensor(json.loads(out)['alignment'], dtype=torch.float64), want)
    assert code==0 and (tmp_path/'a.png').read_bytes()[:4]==b'\x89PNG'
    i, j = divmod(int(want.argmax()), 3)
    code, out, _ = call(capsys, 'select', *EXPERTS, '--k', '2')
    assert code==0 and set(out.split())=={names[i], names[j]}
    code, out, _ = call(capsys, 'select', *EXPERTS, '--k', '1', '--pool', 'one', '--json', '--rule', 'pool')
    assert json.loads(out)['picked']==[names[1+int(want[0, 1:].argmax())]]

def test_align_leaves_out_what_some_expert_did_not_change(models, tmp_path, capsys):
    folder(tmp_path/'frozen', models['one'] | {k: v for k, v in models['base'].items() if k.startswith('blocks.0')})
    assert align_files('base', ['two', 'frozen'])[2:]==(5, 3)
    folder(tmp_path/'same', models['base'] | {'ln.bias': torch.ones(8)})
    assert 'nothing to compare' in call(capsys, 'align', '--base', 'base', '--expert', 'two', '--expert', 'same', '--quiet')[2]

@pytest.mark.parametrize('argv, code, why', [
    ([], 2, 'usage'), (['fly'], 2, 'invalid choice'), (['merge', '--alpha', 'x'], 2, 'alpha'), (['merge', '--method', 'magic'], 2, 'magic'), (['select', *EXPERTS], 2, '--k'), (['align', *EXPERTS, '--remedy', 'x'], 2, 'remedy'),
    (['merge'], 1, '--base is missing'), (['merge', '--base', 'base'], 1, '--expert is missing'), (['merge', '--base', 'base', '--expert', 'one'], 1, '--out is missing'), (['inspect'], 1, '--base is missing'),
    (['inspect', 'base', '--base', 'base'], 1, 'either'), (['inspect', 'nothing'], 1, 'nothing does not exist'), (['select', *EXPERTS, '--k', '9'], 1, 'k must lie'), (['select', *EXPERTS, '--k', '1', '--pool', 'x'], 1, 'no expert is called x'),
    (['align', *EXPERTS, '--pi', '-1'], 1, 'pi'), (['merge', *EXPERTS, '--out', 'base'], 1, 'base'), (['merge', *EXPERTS, '--out', 'o', '--keep', '.2'], 1, 'no option keep'), (['merge', '--config', 'none.yml'], 1, 'none.yml'),
    (['merge', *EXPERTS, '--out', 'o', '--device', 'abacus'], 1, 'abacus'), (['merge', *EXPERTS, '--out', 'o', '--skip', '('], 1, 'skip')])
def test_codes_and_sentences(models, tmp_path, capsys, argv, code, why):
    before = sorted(tmp_path.rglob('*'))
    got, out, err = call(capsys, *argv)
    assert got==code and why in err and not out and 'Traceback' not in err and sorted(tmp_path.rglob('*'))==before

@pytest.mark.parametrize('argv', [['--help'], ['merge', '--help'], ['inspect', '--help'], ['align', '--help'], ['select', '--help'], ['--version']])
def test_help(capsys, argv):
    code, out, _ = call(capsys, *argv)
    assert code==0 and ('example' in out or '--version' in argv)

def test_as_a_process_interrupted_and_resumed(models, tmp_path):
    run = lambda *argv: subprocess.run([sys.executable, '-m', 'subspace_nb.cli', *argv], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {'PYTHONPATH': os.path.dirname(os.path.dirname(os.path.abspath(__file__)))})
    r = run('merge', *EXPERTS, '--out', 'out', '--method', 'nope')
    assert r.returncode==2 and 'usage' in r.stderr
    r = run('merge', *EXPERTS, '--out', 'out')
    assert r.returncode==0 and not r.stderr and r.stdout.startswith('out: 3 experts')

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_command(tmp_path, number):
    for i in range(3): (tmp_path/str(i)).mkdir(); save_file({f'blocks.{l}.mlp.fc1.weight': torch.randn(400, 300, generator=torch.Generator().manual_seed(9*i+l)) for l in range(60)}, tmp_path/str(i)/'model.safetensors')
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    p = subprocess.Popen([sys.executable, '-m', 'subspace_nb.cli', 'merge', '--base', '0', '--expert', '1', '--expert', '2', '--method', 'tsv_m', '--workers', '2', '--out', 'out', '--quiet'],
                         cwd=tmp_path, env=os.environ | {'PYTHONPATH': os.environ.get('PYTHONPATH', root)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    journal, until = partial_folder(tmp_path/'out')/'journal', time.monotonic()+60
    while not journal.exists() and p.poll() is None and time.monotonic()<until: time.sleep(.02)
    p.send_signal(number)
    try: p.communicate(timeout=20)                                                   # workers that live on hold the pipe open
    finally:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass
    assert p.returncode==-number and not (tmp_path/'out').exists()

def test_numbers_as_yaml_1_2_has_them(models, tmp_path, capsys):
    (tmp_path/'c.yml').write_text('base: base\nexperts: [one, two]\nalpha: 3e-1\n')
    code, out, err = call(capsys, 'merge', '--config', 'c.yml', '--out', 'out', '--quiet', '--json')
    assert code==0 and json.loads(out)['report']['alpha']==.3

def test_interrupt(models, capsys, monkeypatch):
    import subspace_nb.stream as stream
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(stream, 'merge_unit', stop)
        code, out, err = call(capsys, 'merge', *EXPERTS, '--out', 'out')
    assert code==130 and 'interrupted' in err and partial_folder('out').exists()
    assert call(capsys, 'merge', *EXPERTS, '--out', 'out')[0]==0 and not partial_folder('out').exists()

def test_esm_reads_what_enters_the_layers(models, tmp_path, capsys):
    for i in range(3): save_file({f'blocks.{l}.mlp.fc1.weight': torch.randn(9, 8, generator=torch.Generator().manual_seed(i)) for l in range(2)}, tmp_path/f'in{i}.safetensors')
    flags = [w for i in range(3) for w in ('--inputs', f'in{i}.safetensors')]
    code, out, err = call(capsys, 'merge', *EXPERTS, '--out', 'out', '--method', 'esm', '--variant', 'cvpr', *flags, '--json')
    assert code==0 and not err
    report = json.loads(out)['report']
    assert report['options']=={'variant': 'cvpr'} and [x['name'] for x in report['inputs']]==['in0.safetensors', 'in1.safetensors', 'in2.safetensors']
    code, _, err = call(capsys, 'merge', *EXPERTS, '--out', 'other', '--method', 'esm')
    assert code==1 and 'one file for each of 3' in err and not (tmp_path/'other').exists()

def test_type_of_the_result(models, tmp_path, capsys):
    assert call(capsys, 'merge', *EXPERTS, '--out', 'out', '--dtype', 'bfloat16')[0]==0
    assert set(Checkpoint('out').dtypes.values())=={torch.bfloat16}
