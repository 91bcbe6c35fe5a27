"""The same merge by this package, by mergekit and by fusion-bench, each in a process and an environment of its own, from the same files:
the rows "files" of `benchmarks/cost.py`, which runs this.

Base and experts are random tensors of the shapes of ViT-B/32's twelve blocks in safetensors folders: under transformers' names beside
mergekit, which asks transformers for a model's parameters, under open_clip's beside fusion-bench. `took` is the wall clock of the whole
process, reading, writing and the start of the interpreter with its imports; `start` the imports alone, measured apart, the faster of two;
`merging` what is left. `MiB` is the largest memory of the process that is no mapped file; `apart` the relative difference of its result
to ours. mergekit gets its own configuration file; fusion-bench's algorithm classes run on a pool of modules.
"""
import json, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from measure import task_vector_of

alphas = dict(task_arithmetic=.3, ties=1., tsv_m=1., iso_c=1.)
tools = {'task_arithmetic': ('ours', 'mergekit'), 'ties': ('ours', 'mergekit'), 'tsv_m': ('ours', 'fusion-bench'), 'iso_c': ('ours', 'fusion-bench')}
fusion_script = '''
import sys, torch
from safetensors.torch import load_file, save_file
from fusion_bench import BaseModelPool
from fusion_bench.method import IsotropicMergingInCommonSubspace, TaskSingularVectorMerging
method, out, base, *experts = sys.argv[1:]
def module(folder):
    top = torch.nn.Module()
    for name, w in load_file(f'{folder}/model.safetensors').items():
        *path, last = name.split('.')
        at = top
        for p in path:
            if not hasattr(at, p): at.add_module(p, torch.nn.Module())
            at = getattr(at, p)
        at.register_parameter(last, torch.nn.Parameter(w, requires_grad=False))
    return top
pool = BaseModelPool({'_pretrained_': module(base), **{f'expert_{i}': module(e) for i, e in enumerate(experts)}})
how = {'tsv_m': lambda: TaskSingularVectorMerging(alpha=1.), 'iso_c': lambda: IsotropicMergingInCommonSubspace(scaling_factor=1., exclude_keys=[])}
save_file({k: v.contiguous() for k, v in how[method]().run(pool).state_dict().items()}, out)
'''


def as_transformers(state):
    "The same tensors under the names of transformers' CLIPVisionModel, q, k and v apart."
    out, names = {}, {'attn.out_proj': 'self_attn.out_proj', 'mlp.c_fc': 'mlp.fc1', 'mlp.c_proj': 'mlp.fc2'}
    for k, w in state.items():
        at = 'encoder.layers.'+k.split('.')[3]
        part = '.'.join(k.split('.')[4:])
        if part=='attn.in_proj_weight': out |= {f'{at}.self_attn.{x}_proj.weight': y.contiguous() for x, y in zip('qkv', w.chunk(3))}
        else: out[f'{at}.{names[part.removesuffix(".weight")]}.weight'] = w
    return out


def write_inputs(folder, experts, blocks, width, rename):
    "Base and experts as folders that every tool reads; those that are there are kept."
    kind = dict(model_type='clip_vision_model', architectures=['CLIPVisionModel'], hidden_size=width, num_hidden_layers=blocks, num_attention_heads=max(1, width//64))
    rng, base = torch.Generator().manual_seed(999), None
    for i in range(-1, experts):
        at = folder/('base' if i<0 else f'expert_{i}')
        tau = task_vector_of(blocks, width, i) if base is None or not (at/'model.safetensors').exists() else None
        if base is None: base = {k: .02*torch.randn(w.shape, generator=rng) for k, w in tau.items()}
        if (at/'model.safetensors').exists(): continue
        at.mkdir(parents=True, exist_ok=True)
        (at/'config.json').write_text(json.dumps(kind))
        save_file(rename(base if i<0 else {k: base[k]+w for k, w in tau.items()}), at/'part', metadata={'format': 'pt'})
        os.replace(at/'part', at/'model.safetensors')
    return folder/'base', [folder/f'expert_{i}' for i in range(experts)]


def watched(command, threads, log):
    "Run a command: seconds, and the largest anonymous memory of its process in MiB."
    env = {k: v for k, v in os.environ.items() if k!='PYTHONPATH'} | dict(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
    t, peak = time.perf_counter(), 0
    with open(log, 'wb') as f:
        p = subprocess.Popen([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT, env=env)
        while p.poll() is None:
            try: peak = max(peak, *(int(l.split()[1]) for l in open(f'/proc/{p.pid}/status') if l.startswith('RssAnon')), 0)
            except (OSError, IndexError): pass
            time.sleep(.01)
    if p.returncode: raise RuntimeError(f"{command[0]} failed:\n{Path(log).read_text(errors='replace')[-2000:]}")
    return time.perf_counter()-t, peak/1024


def commands(tool, envs, method, base, experts, out, folder):
    "What to run, and what only starts the interpreter."
    python = envs[tool]/'bin/python'
    if tool=='mergekit':
        own = dict(density=.2) if method=='ties' else {}
        config = dict(merge_method=method, base_model=str(base), dtype='float32', models=[dict(model=str(e), parameters=dict(weight=alphas[method]) | own) for e in experts],
                      parameters=dict(normalize=method=='ties'))
        (folder/'mergekit.yml').write_text(json.dumps(config))                      # JSON is YAML
        return [envs[tool]/'bin/mergekit-yaml', folder/'mergekit.yml', out, '--no-copy-tokenizer', '--no-write-model-card', '--quiet'], [python, '-c', 'import mergekit.scripts.run_yaml']
    if tool=='fusion-bench':
        out.mkdir(parents=True)
        return [python, '-c', fusion_script, method, out/'model.safetensors', base, *experts], [python, '-c', fusion_script.split('method, out')[0]]
    own = ['--keep', '0.2'] if method=='ties' else []
    return [python, '-m', 'subspace_nb.cli', 'merge', '--base', base, *(x for e in experts for x in ('--expert', e)), '--method', method, '--alpha', alphas[method], *own, '--out', out, '--quiet'], \
        [python, '-c', 'import subspace_nb.cli']


def apart(a, b, base):
    "Relative difference between two merged changes."
    x, y, w = ({k: v for f in sorted(folder.glob('*.safetensors')) for k, v in load_file(f).items()} for folder in (a, b, base))
    square = lambda d: sum(d(k).double().square().sum().item() for k in w)
    return (square(lambda k: x[k]-y[k])/square(lambda k: y[k]-w[k]))**.5


def version(tool, envs):
    "Of a tool, as its environment has it."
    ask = f"from importlib.metadata import version; print(version('{'subspace_nb' if tool=='ours' else tool}'))"
    return subprocess.run([envs[tool]/'bin/python', '-c', ask], capture_output=True, text=True).stdout.strip()


def environments(mergekit, fusion_bench):
    "Tool -> its virtual environment; tools without one are left out, and that is said."
    envs = {'ours': Path(sys.prefix), 'mergekit': Path(mergekit), 'fusion-bench': Path(fusion_bench)}
    for t, at in envs.items():
        if not (at/'bin/python').exists(): print(f'{t} is left out: there is no environment at {at}')
    return {t: at for t, at in envs.items() if (at/'bin/python').exists()}


def jobs(envs, sizes, blocks, width):
    "Keys of the rows, those on the same files side by side."
    kit = lambda method: 'mergekit' in tools[method]
    return [dict(way='files', tool=t, method=m, experts=n, blocks=blocks, width=width) for first in (True, False) for n in sizes
            for m in tools if kit(m)==first for t in tools[m] if t in envs]


def run_files(results, todo, envs, threads, folder=None, over=lambda: False):
    "The rows in `todo`; inputs are written to a temporary folder, which holds base and experts once. False where `over()` said to stop."
    starting, cell = {}, lambda key: (key['method'], key['experts'])
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for method, n in dict.fromkeys(map(cell, todo)):
            if over(): return False
            some = [key for key in todo if cell(key)==(method, n)]
            blocks, width, kit = some[0]['blocks'], some[0]['width'], 'mergekit' in tools[method]
            top, other = (Path(scratch)/f"{'transformers' if k else 'open_clip'}" for k in (kit, not kit))
            shutil.rmtree(other, ignore_errors=True)
            base, experts = write_inputs(top, n, blocks, width, as_transformers if kit else dict)
            os.sync()
            for f in (base, *experts): (f/'model.safetensors').read_bytes()                  # in the page cache for all
            with tempfile.TemporaryDirectory(dir=scratch) as made:
                made = Path(made)
                for key in [dict(some[0], tool='ours'), *(k for k in some if k['tool']!='ours')]:
                    t = key['tool']
                    run, start = commands(t, envs, method, base, experts, made/t, made)
                    if t not in starting: starting[t] = min(watched(start, threads, made/'log')[0] for _ in range(2))
                    took, mib = watched(run, threads, made/'log')
                    far = None if t=='ours' else float(f"{apart(made/t, made/'ours', base):.1e}")
                    row = lambda: dict(took=round(took, 2), start=round(starting[t], 2), merging=round(max(0., took-starting[t]), 2), MiB=round(mib), apart=far, version=version(t, envs))
                    r = results.row(row, **key)
                    print(f"files  {t:14}{method:18}N = {n:<4}{r['took']:>8.2f} s, of which imports {r['start']:>5.2f} s{r['MiB']:>8} MiB   apart {r['apart']}", flush=True)
    return True
