"What the README tells a reader to type is typed here."
import re
import shlex
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from subspace_nb.boost import subspace_boosting
from subspace_nb.cli import main
from subspace_nb.merge import task_arithmetic
from subspace_nb.tasks import task_vector

root = Path(__file__).parent.parent
text = (root/'README.md').read_text(encoding='utf-8')

def blocks(language): return re.findall(rf'```{language}\n(.*?)```', text, re.S)

def checkpoints(folder, names):
    "Small state dicts with CLIP's names, written as a reader would have them."
    rng = torch.Generator().manual_seed(0)
    shapes = {'visual.transformer.resblocks.0.attn.in_proj_weight': (96, 32), 'visual.transformer.resblocks.0.mlp.c_fc.weight': (128, 32), 'visual.ln_post.weight': (32,)}
    base = {k: torch.randn(s, generator=rng) for k, s in shapes.items()}
    states = [base]+[{k: v+.1*torch.randn(v.shape, generator=rng) for k, v in base.items()} for _ in names[1:]]
    for name, state in zip(names, states): save_file(state, folder/name)
    return states

def by_hand(base, *experts): return subspace_boosting(task_arithmetic([task_vector(base, e) for e in experts]), 0.).apply(base, .3)

def same(got, want): return got.keys()==want.keys() and all(torch.allclose(got[k], want[k], atol=1e-6) for k in want)

def test_six_lines_merge_files(tmp_path, monkeypatch):
    block, = blocks('python')
    assert len(block.strip().splitlines())==6
    states = checkpoints(tmp_path, ('base.safetensors', 'cars.safetensors', 'maps.safetensors'))
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert same(load_file('merged.safetensors'), by_hand(*states))

def test_the_command_does_the_same(tmp_path, monkeypatch):
    line, = (l for b in blocks('sh') for l in b.splitlines() if l.startswith('subspace-nb merge'))
    for name in ('base', 'cars', 'maps'): (tmp_path/name).mkdir()
    states = checkpoints(tmp_path, [f'{n}/model.safetensors' for n in ('base', 'cars', 'maps')])
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:])==0
    assert same(load_file('merged/model.safetensors'), by_hand(*states))

def test_each_make_target_exists():
    made = set(re.findall(r'^([a-z-]+):', (root/'Makefile').read_text(), re.M))
    named = set(re.findall(r'`?make ([a-z-]+)', text))
    assert named<=made and {'run', 'test'}<=named
