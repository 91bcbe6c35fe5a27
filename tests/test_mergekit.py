"""mergekit's files, run by this command and by mergekit itself: the same weights to float rounding.

mergekit lives in an environment of its own: `make mergekit` makes .mergekit/ here; SUBSPACE_NB_MERGEKIT names the python of another one."""
import json, os, re, subprocess
from pathlib import Path
import pytest
import torch

from subspace_nb.cli import main
from subspace_nb.experts import import_open_clip
from subspace_nb.hub import Checkpoint
import_open_clip()
import transformers
transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()

OWN = Path(__file__).resolve().parent.parent/'.mergekit'
PYTHON = os.environ.get('SUBSPACE_NB_MERGEKIT') or (str(OWN/'bin'/'python') if (OWN/'.installed').exists() else None)
pytestmark = pytest.mark.skipif(not PYTHON, reason='`make mergekit` makes the environment that this compares with')

MODELS = {
    'llama': lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, max_position_embeddings=32)),
    'vit': lambda: transformers.ViTModel(transformers.ViTConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)),
    'bert': lambda: transformers.BertForMaskedLM(transformers.BertConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, max_position_embeddings=16)),
    'clip': lambda: transformers.CLIPModel(transformers.CLIPConfig(projection_dim=16, text_config=dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, max_position_embeddings=12),
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)))}

TWO = '''
merge_method: {method}
base_model: {family}/base
models:
  - model: {family}/base
  - model: {family}/one
    parameters: {{weight: 0.7{one}}}
  - model: {family}/two
    parameters: {{weight: 0.4{two}}}
{more}
'''
CASES = {'task_arithmetic': ('', '', ''), 'task_arithmetic normalized': ('', '', 'parameters: {normalize: true, lambda: 0.8}'),
         'ties': (', density: 0.3', ', density: 0.6', ''), 'ties with lambda': (', density: 0.2', ', density: 0.2', 'parameters: {normalize: false, lambda: 0.5, int8_mask: true}\ndtype: float32'),
         'ties by filters': (', density: [{filter: mlp, value: 0.9}, {value: 0.2}]', '', 'parameters: {density: 0.5}\ntokenizer_source: base'),
         'ties by gradients': (', density: [1, 0.7, 0.1]', ', density: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.5}]', 'parameters: {normalize: true}'),
         'ties in float16, half': (', density: 0.5', ', density: 0.5', 'dtype: float16'), 'ties in half precision': (', density: 0.5', ', density: 0.5', 'dtype: bfloat16'), 'task_arithmetic to half precision': ('', '', 'dtype: float32\nout_dtype: float16'),
         'breadcrumbs': (', density: 0.4, gamma: 0.1', ', density: 0.8, gamma: 0.05', ''), 'breadcrumbs_ties': (', density: 0.4', ', density: 0.8', ''),
         'dare_linear': (', density: 1.0', ', density: 1.0', ''), 'dare_ties': (', density: 1.0', ', density: 1.0', '')}

SCRIPT = '''
import json, sys, torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import main as merge_any
torch.set_num_threads(1)
for config, out in json.load(open(sys.argv[1])):
    if 'model.safetensors' in open(config).read(): merge_any([config, out], standalone_mode=False)
    else: run_merge(MergeConfiguration.model_validate(yaml.safe_load(open(config))), out, MergeOptions(allow_crimes=True, copy_tokenizer=False, write_model_card=False, quiet=True))
'''

def runs(): # name -> family, YAML
    out = {}
    for name, (one, two, more) in CASES.items():
        for family in MODELS:
            if family!='llama' and name not in ('ties', 'task_arithmetic normalized'): continue
            if 'tokenizer_source' in more and family!='llama': continue
            text = TWO.format(method=name.split()[0], family=family, one=one, two=two, more=more)
            if family!='llama': text = re.sub(rf'{family}/\w+', r'\g<0>/model.safetensors', text)         # mergekit-pytorch, which merges files of any architecture
            out[f'{name}, {family}'] = family, text
    out['linear, llama'] = 'llama', 'merge_method: linear\nmodels:\n  - model: llama/one\n    parameters: {weight: 0.7}\n  - model: llama/two\n    parameters: {weight: 0.4}\n'
    out['linear with the base, llama'] = 'llama', TWO.format(method='linear', family='llama', one='', two='', more='parameters: {weight: 0.5}')
    out['model_stock, llama'] = 'llama', 'merge_method: model_stock\nbase_model: llama/base\nmodels: [{model: llama/base}, {model: llama/one}, {model: llama/two}]\n'
    return out

@pytest.fixture(scope='module')
def room(tmp_path_factory):
    "All models and files, and all of mergekit's answers, made in one process of its own."
    root = tmp_path_factory.mktemp('kit')
    from tokenizers import Tokenizer, models as token_models
    words = Tokenizer(token_models.WordLevel({f'w{i}': i for i in range(63)} | {'<unk>': 63}, unk_token='<unk>'))
    for family, make in MODELS.items():
        torch.manual_seed(0)
        model = make(); start = {k: v.clone() for k, v in model.state_dict().items()}
        for i, name in enumerate(('base', 'one', 'two')):
            rng = torch.Generator().manual_seed(i)
            model.load_state_dict({k: v+i*.02*torch.randn(v.shape, generator=rng) if v.is_floating_point() and i else v for k, v in start.items()})
            model.tie_weights()
            model.save_pretrained(root/family/name)
            transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token='<unk>').save_pretrained(root/family/name)
    plan = []
    for i, (_, text) in enumerate(runs().values()): (root/f'{i}.yml').write_text(text); plan.append((f'{i}.yml', f'kit{i}'))
    (root/'plan.json').write_text(json.dumps(plan))
    r = subprocess.run([PYTHON, '-c', SCRIPT, 'plan.json'], cwd=root, capture_output=True, text=True, env=os.environ | {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'})
    assert r.returncode==0, r.stderr[-3000:]
    return root

@pytest.mark.parametrize('name', runs())
def test_same_weights_as_mergekit(room, monkeypatch, name):
    i, half = list(runs()).index(name), 'half' in name
    monkeypatch.chdir(room)
    assert main(['merge', '--config', f'{i}.yml', '--out', f'ours{i}', '--quiet'])==0
    theirs, ours, base = (Checkpoint(room/p) for p in (f'kit{i}', f'ours{i}', f'{runs()[name][0]}/base'))
    moved = 0
    for k in ours:
        assert k in theirs and ours[k].dtype==theirs[k].dtype, k
        a, b = ours[k].double(), theirs[k].double()
        torch.testing.assert_close(a, b, rtol=1e-2 if half else 1e-5, atol=2e-6)
        moved += (b-base[k].double()).norm().item()
    assert moved>.1
    if half: assert sum((ours[k]!=theirs[k]).sum().item() for k in ours)<=.02*sum(v.numel() for v in ours.values())
    if 'llama' in name: assert (ours.folder/'config.json').exists()
