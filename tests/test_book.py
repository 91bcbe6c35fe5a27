"The runner, the pages, the README, what `check` finds, and the files that say what the package needs."
import ast, contextlib, io, json, os, re, runpy, shutil, subprocess, sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
import nbformat, pytest, setuptools, torch
from nbdev.clean import nbdev_clean
from nbformat.v4 import new_code_cell as code, new_markdown_cell as md, new_notebook, new_output
from safetensors.torch import load_file, save_file
import subspace_nb
from subspace_nb import book
try: import tomllib
except ImportError: import tomli as tomllib

root = Path(__file__).parent.parent
dot = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='

def write(folder, name, *cells):
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), folder/f'{name}.ipynb')
    return folder/f'{name}.ipynb'

# --- the files that say what the package needs

@pytest.fixture
def ini():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

@pytest.fixture
def project(): return tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))

@pytest.fixture
def handed_over(monkeypatch):
    "What setup.py hands to setuptools."
    got = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **kw: got.update(kw))
    runpy.run_path(str(root/'setup.py'))
    return got

def test_settings_and_pyproject_agree(ini, project):
    assert project['project']['name']==ini['name']==project['tool']['nbdev']['lib_path']
    assert set(project['project'])=={'name', 'dynamic'}, "settings.ini says the rest"
    assert subspace_nb.__version__==ini['version']

def test_dynamic_is_what_setup_py_sets(project, handed_over):
    field = dict(version='version', description='description', author='authors', license='license', keywords='keywords', classifiers='classifiers',
                 python_requires='requires-python', long_description='readme', install_requires='dependencies', extras_require='optional-dependencies',
                 entry_points='scripts')
    assert sorted(project['project']['dynamic'])==sorted(f for k, f in field.items() if k in handed_over)

def test_setup_py_reads_settings(ini, handed_over):
    assert (handed_over['name'], handed_over['version'])==(ini['name'], ini['version'])
    assert handed_over['install_requires']==ini['requirements'].split()
    assert handed_over['extras_require']['dev']==ini['dev_requirements'].split()

def third_party(path): # names of the distributions that a module imports
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): imported |= {a.name.split('.')[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level: imported.add(node.module.split('.')[0])
    comes_with = {'PIL': 'pillow', 'open_clip': 'open_clip_torch', 'torchvision': 'open_clip_torch',
                  'nbformat': 'nbconvert', 'pygments': 'nbconvert', 'bs4': 'nbconvert', 'traitlets': 'ipywidgets', 'yaml': 'pyyaml', 'IPython': 'ipykernel'}
    return {comes_with.get(m, m) for m in imported-set(sys.stdlib_module_names)-{'subspace_nb'}}

def test_what_modules_import_is_required(ini):
    names = lambda key: {re.match(r'[\w-]+', r)[0] for r in ini[key].split()}
    needs = {p.name: third_party(p)-names('requirements') for p in (root/'subspace_nb').glob('*.py')}
    for n in ('book.py', 'site.py'): assert needs.pop(n) <= names('dev_requirements'), 'printing the book is for developers'
    assert needs.pop('published.py') <= {'datasets'} <= names('dev_requirements'), 'asked for by name where it is missing'
    assert {k: v for k, v in needs.items() if v}=={}

def test_changelog_names_the_version(ini): assert f"## {ini['version']}" in (root/'CHANGELOG.md').read_text(encoding='utf-8')

# --- running

@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    "A book of three cells, executed."
    top = tmp_path_factory.mktemp('book')
    write(top/'nbs', '00_one', md('# One\n> Lead\n\nInline $\\sigma_1$ and\n\n$$\\frac{a}{b}$$'), code('#| export\nx = 1\nx'),
          code('#| cuda\nopen("made.txt", "w")'), code('print("end")'))
    write(top/'nbs', 'index', md('# All'), code('#| eval: false\n1/0'))
    (top/'nbs/results').mkdir()
    row = dict(method='TA', tasks=8, order=0, accuracy=61.25, normalised=70.)
    (top/'nbs/results/vision.json').write_text(json.dumps(dict(meta={}, rows=[row])))
    with contextlib.redirect_stdout(io.StringIO()) as out: ok = book.run_book(top, gpu=False, workers=2)
    return top, ok, out.getvalue()

def test_run_prints_a_line_for_each_chapter_and_ends_with_results_and_pages(ran):
    _, ok, out = ran
    assert ok and re.search(r'^\[ 1/2\] 00_one — One  \d+ s$', out, re.M) and re.search(r'^\[ 2/2\] index — All  \d+ s$', out, re.M)
    assert out.index('61.2 (70.0)')<out.index('2 of 2 chapters')<out.index('index.html')

def test_a_cuda_cell_is_skipped_and_says_so(ran):
    top, *_ = ran
    cells = book.read_notebook(top/'_book/00_one.ipynb').cells
    assert cells[2].outputs[0].text.startswith(book.skip_note) and 'GPU' in cells[2].outputs[0].text
    assert not (top/'nbs/made.txt').exists() and 'tags' not in cells[2].metadata

def test_pages_have_mathml_and_ask_for_nothing(ran):
    top, *_ = ran
    for p in (top/'_book').glob('*.html'): assert book.outside_requests(p.read_text(encoding='utf-8'))==[]
    one = (top/'_book/00_one.html').read_text(encoding='utf-8')
    assert one.count('<math')==2 and '<mfrac>' in one and '#|' not in one and '$' not in re.sub(r'<style.*?</style>', '', one, flags=re.S)

def test_stored_outputs_of_skipped_cells_stay_once(tmp_path):
    path = write(tmp_path, '00_gpu', code('#| cuda\n1/0', outputs=[new_output('stream', name='stdout', text='measured on a GPU')]))
    for _ in range(2): book.save(path, gpu=False)
    assert [o.text.split(':')[0] for o in book.read_notebook(path).cells[0].outputs]==['Skipped', 'measured on a GPU']

def test_with_a_gpu_cuda_cells_run(): assert book.why_skip('#| cuda\nx', gpu=True) is None

@pytest.mark.parametrize('source, timeout, said', [('boom', 60, 'NameError'), ('import time\ntime.sleep(30)', 1, 'took too long')])
def test_a_failing_cell_is_named_and_what_ran_is_written(tmp_path, capsys, source, timeout, said):
    write(tmp_path/'nbs', '00_good', md('# Good'), code('1'))
    write(tmp_path/'nbs', '01_bad', md('# Bad'), code('2'), code(source))
    write(tmp_path/'nbs', '02_after', md('# After'), code('3'))
    assert not book.run_book(tmp_path, gpu=False, timeout=timeout, workers=1)
    out = capsys.readouterr().out
    assert '01_bad, cell 2' in out and source in out and said in out and '\x1b[' not in out
    assert {p.name for p in (tmp_path/'_book').glob('*.html')}=={'00_good.html', '01_bad.html', 'index.html'}

def test_a_failing_run_exits_with_1(tmp_path):
    write(tmp_path/'nbs', '00_bad', code('1/0'))
    assert book.main(['run', '--root', str(tmp_path)])==1

def test_save_leaves_a_failing_notebook_as_it_was(tmp_path):
    path = write(tmp_path/'nbs', '00_bad', code('1'), code('1/0'))
    before = path.read_bytes()
    assert book.main(['save', '00_bad', '--root', str(tmp_path)])==1
    assert path.read_bytes()==before

def test_progress_bars_and_widgets_leave_no_dead_output(tmp_path):
    nb = new_notebook(cells=[code('from tqdm.auto import tqdm\nfor i in tqdm(range(3)): pass'), code('import ipywidgets\nipywidgets.IntSlider()')])
    book.execute(nb, tmp_path, gpu=False)
    assert nb.cells[0].outputs==[] and 'JupyterLab' in nb.cells[1].outputs[0].data['text/plain'] and 'widgets' not in nb.metadata

# --- formulas

@pytest.mark.parametrize('tex', [r'\nosuch', r'\frac{1', 'a & b'])
def test_formulas_that_are_not_understood_are_refused(tex):
    with pytest.raises(ValueError, match='formula not understood'): book.mathml(tex)

def test_letters_of_other_alphabets():
    text = lambda tex: ''.join(book.ET.fromstring(book.mathml(tex)).itertext())
    assert text(r'\mathcal{LB}')=='ℒℬ' and text(r'\mathbb R')=='ℝ' and text(r'\mathbf 1')=='𝟏'

# --- pictures and the items of the papers

def figure(kind='image/png', data=dot): return new_output('display_data', {kind: data, 'text/plain': '<Figure>'})

def alts(html): # texts of the images, as a browser reads them
    found, reader = [], HTMLParser()
    reader.handle_starttag = lambda tag, attrs: found.append(dict(attrs).get('alt')) if tag=='img' else None
    reader.handle_startendtag = reader.handle_starttag
    reader.feed(html)
    return found

def body(*cells): return book.body_html(new_notebook(cells=list(cells)))

def test_several_pictures_of_a_cell_are_told_apart():
    html = body(md('# Dots'), code('#| fig-alt: A "dot" & more\ndraw()', outputs=[figure(), figure()]), code('again()', outputs=[figure()]))
    assert alts(html)==['A "dot" & more (1 of 2)', 'A "dot" & more (2 of 2)', 'Figure: Dots']

def test_svg_has_its_text():
    html = body(code('#| fig-alt: A <line>\ndraw()', outputs=[figure('image/svg+xml', '<svg viewBox="0 0 1 1"><path d="M0 0"/></svg>')]))
    assert re.search('role="img"[^>]*><svg', html) and 'aria-label="A &lt;line&gt;"' in html

@pytest.mark.parametrize('cell', [md('# One\n<!-- paper: SB Figure 1a; ESM Theorem 2 -->\nText with **bold**.'), md('<!-- paper: SB Figure 1a -->\n<!-- paper: ESM Theorem 2 -->\nText with **bold**.'),
                                  md('Text with **bold**.\n<!--paper:SB Figure 1a;ESM Theorem 2;-->')])
def test_labels_of_markdown_cells(cell):
    html = body(cell)
    assert re.search('<span [^>]*id="sb-figure-1a"[^>]*>Subspace Boosting, Figure 1a</span>', html)
    assert 'id="esm-theorem-2"' in html and '<strong>bold</strong>' in html and '<!--' not in html

def test_an_anchor_stands_once_on_a_page():
    html = body(md('<!-- paper: SB Table 3 -->\nText'), code('#| paper: SB Table 3; SB Table 7\nshow()', outputs=[figure()]))
    assert html.count('>Subspace Boosting, Table 3<')==2 and '>Table 7<' in html and html.count('id="sb-table-3"')==html.count('id="sb-table-7"')==1
    assert html.index('show')<html.index('Table 7')<html.index('<img')

def test_cells_that_are_not_shown_give_no_label():
    assert 'Boosting' not in body(code('#| hide\n#| paper: SB Table 3\nshow()'))

def test_labels_are_not_for_the_readme(tmp_path):
    write(tmp_path, 'index', md('# All\n<!-- paper: SB Figure 2 -->\nText'), code('#| paper: SB Figure 2\n#| fig-alt: One dot\nshow()', outputs=[figure()]))
    text, figures = book.readme(tmp_path)
    assert 'paper' not in text and 'Figure 2' not in text and '# All\nText' in text and [f'![One dot]({f})' in text for f in figures]==[True]

@pytest.mark.parametrize('text', ['SB Figure', 'TA Figure 1', 'SB Lemma 1', 'SB Figure 1, SB Figure 2', 'SB Figure 1A'])
def test_an_item_that_no_paper_can_have_is_refused(text):
    with pytest.raises(ValueError, match='^paper: .* is not of the form'): book.paper_items(text)

@pytest.mark.parametrize('source, names', [
    ('x, (y, *z) = 1, (2, 3)', 'x y z'), ('for i, j in []: k = 1', 'i j k'), ('with open(f) as g: pass', 'g'), ('import os.path, numpy as np', 'os np'), ('from a import b as c, d', 'c d'),
    ('if (n := 3): m = 1', 'n m'), ('def f(a):\n    b = 1', 'f'), ('class C:\n    a = 1', 'C'), ('[x for x in y]; (lambda a: a)(1)', ''), ('a.b = 1; c[0] = 2', ''), ('a += 1', 'a'), ('a: int = 1', 'a'),
    ('%time v = 1\n!ls\nw = 1', 'w'), ('try: pass\nexcept E as e: pass\nelse: q = 1', 'e q'), ('async def f(): pass', 'f')])
def test_names_that_a_cell_binds(source, names): assert book.bound_names(source)==set(names.split())

@pytest.mark.parametrize('cells, found', [
    (['#| export\ndef f(): pass', 'f = 1'], [(1, ['f'])]), (['f = 1', '#| export\ndef f(): pass'], []), (['#| export\n_f = 1', '_f = 2'], []), (['#| export\nimport re', 'import re'], []),
    (['#| export\ndef f(): pass', '#| export\ndef f(): return 1'], []), (['#| exporti\nshare = 1', 'for share in range(2): pass'], [(1, ['share'])]), (['#| export\ndef f(): pass', 'def g():\n    f = 1'], []),
    (['#| export\ndef f(): pass\nclass C: pass', 'C = f = 1', 'import f'], [(1, ['C', 'f']), (2, ['f'])])])
def test_hidden_names(cells, found): assert book.hidden_names(new_notebook(cells=[code(c) for c in cells]))==found

# --- results

def test_results_table_has_a_gap_where_a_row_is_missing():
    row = dict(method='TIES + boosting', tasks=8, accuracy=50., normalised=60.)
    rows = [row, row|dict(order=1, accuracy=51.), row|dict(tasks=20, method='TIES')]
    lines = book.results_table(rows).splitlines()
    assert [c.strip() for c in lines[2].strip('|').split('|')]==['TIES + boosting', '50.5 (60.0)', '–']
    assert len(lines)==4 and len(book.results_table(rows, ['TIES']).splitlines())==3

# --- what `check` finds

@pytest.fixture(scope='module')
def clean_project(tmp_path_factory):
    "A small project in which everything fits together."
    top = tmp_path_factory.mktemp('project')
    shutil.copy(root/'pyproject.toml', top)
    one = write(top/'nbs', '00_one', code('#| default_exp one'), md('# One\n$\\sigma$'), code('#| export\ndef f(): return 1'))
    figure = new_output('display_data', {'image/png': dot, 'text/plain': '<Figure>'})
    index = write(top/'nbs', 'index', md('# All\n[one](00_one.ipynb)'), code('#| echo: false\n#| fig-alt: A dot [dark]\ndraw()', outputs=[figure]))
    (top/'subspace_nb').mkdir()
    (top/'subspace_nb/__init__.py').write_text('__version__ = "0.1.0"\n')
    for p in (one, index): nbdev_clean(str(p))
    env = {k: v for k, v in os.environ.items() if k!='IN_TEST'}
    subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export as e; e()'], cwd=top, env=env, check=True)
    book.write_readme(top)
    return top

@pytest.fixture
def copy(clean_project, tmp_path): return Path(shutil.copytree(clean_project, tmp_path/'p'))

def edit(path, change):
    nb = json.loads(path.read_text(encoding='utf-8'))
    change(nb)
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False)+'\n', encoding='utf-8')

def test_nothing_to_find(copy, capsys):
    assert book.problems(copy)==[]
    assert book.main(['check', '--root', str(copy)])==0

def test_a_changed_module_is_found(copy, capsys):
    (copy/'subspace_nb/one.py').write_text('x = 1\n')
    assert book.main(['check', '--root', str(copy)])==1
    assert 'subspace_nb/one.py differs' in capsys.readouterr().out

def test_a_changed_notebook_is_found_in_its_module(copy):
    edit(copy/'nbs/00_one.ipynb', lambda nb: nb['cells'][2].update(source=['#| export\n', 'def f(): return 2']))
    assert any('one.py differs' in p for p in book.problems(copy))

def test_a_module_without_a_notebook_is_found(copy):
    (copy/'subspace_nb/stray.py').write_text('x = 1\n')
    assert [p for p in book.problems(copy) if 'stray.py' in p]

@pytest.mark.parametrize('change', [lambda nb: nb['cells'][2].update(execution_count=3), lambda nb: nb['cells'][1].update(metadata={'scrolled': True}),
                                    lambda nb: nb.update(metadata={'language_info': {'name': 'python'}})])
def test_an_unclean_notebook_is_found(copy, change):
    edit(copy/'nbs/00_one.ipynb', change)
    assert book.problems(copy)==['nbs/00_one.ipynb is not clean: run nbdev-clean']

def test_an_edited_readme_is_found(copy):
    (copy/'README.md').write_text('mine')
    assert book.problems(copy)==['README.md differs from nbs/index.ipynb: run make readme']
    (copy/'README.md').unlink()
    assert book.problems(copy)==['README.md differs from nbs/index.ipynb: run make readme']

def test_a_lost_or_stray_figure_is_found(copy):
    (copy/'nbs/index_files/stray.png').write_bytes(b'')
    assert book.problems(copy)==['nbs/index_files/ differs from nbs/index.ipynb: run make readme']
    shutil.rmtree(copy/'nbs/index_files')
    assert book.problems(copy)==['nbs/index_files/ differs from nbs/index.ipynb: run make readme']

def test_a_chapter_that_the_index_does_not_list_is_found(copy):
    shutil.copy(copy/'nbs/index.ipynb', copy/'nbs/10_new.ipynb')
    assert 'nbs/index.ipynb does not list 10_new: run make save NB=index' in book.problems(copy)

@pytest.mark.parametrize('name, size', [('00_one', 1.6e6), ('index', .7e6)])
def test_a_fat_notebook_is_found(copy, name, size):
    edit(copy/f'nbs/{name}.ipynb', lambda nb: nb['cells'].append(dict(cell_type='markdown', id='fat', metadata={}, source=['x'*int(size)])))
    assert any(p.startswith(f'nbs/{name}.ipynb has') for p in book.problems(copy))

def with_output(output): return lambda nb: nb['cells'][2].update(outputs=[output])

@pytest.mark.parametrize('output, said', [
    (dict(output_type='stream', name='stdout', text=['read /ho''me/me/x\n']), 'path of a machine'),
    (dict(output_type='stream', name='stderr', text=['.venv/lib/site-pa''ckages/torch: UserWarning\n']), 'path of a machine'),
    (dict(output_type='error', ename='E', evalue='', traceback=[]), 'output is an error')])
def test_outputs_that_should_not_stay_are_found(copy, output, said):
    edit(copy/'nbs/00_one.ipynb', with_output(output))
    assert any(said in p for p in book.problems(copy))

@pytest.mark.parametrize('source, output, said', [
    ('draw()', dict(output_type='display_data', metadata={}, data={'image/png': dot}), ['nbs/00_one.ipynb, cell 3: its picture has no text, #| fig-alt:']),
    ('#| fig-alt:\ndraw()', dict(output_type='execute_result', execution_count=None, metadata={}, data={'image/svg+xml': '<svg/>'}), ['nbs/00_one.ipynb, cell 3: its picture has no text, #| fig-alt:']),
    ('#| paper: SB Fig 1\nshow()', None, ["nbs/00_one.ipynb, cell 3: paper: 'SB Fig 1' is not of the form"]), ('f = f()', None, ['nbs/00_one.ipynb, cell 3: binds f, which an exported cell defines']),
    ('#| fig-alt: Fine\ng = f()', dict(output_type='display_data', metadata={}, data={'image/png': dot}), [])])
def test_problems_of_a_lesson_cell_are_found(copy, source, output, said):
    edit(copy/'nbs/00_one.ipynb', lambda nb: nb['cells'].append(dict(cell_type='code', execution_count=None, id='lesson', metadata={}, source=source.splitlines(True), outputs=[output] if output else [])))
    found = book.notebook_problems(copy/'nbs/00_one.ipynb')
    assert len(found)==len(said) and all(f.startswith(s) for f, s in zip(found, said))

def test_a_formula_that_no_page_can_show_is_found(copy):
    edit(copy/'nbs/00_one.ipynb', lambda nb: nb['cells'][1].update(source=['# One\n', '$\\nosuch$']))
    assert any('formula not understood' in p for p in book.problems(copy))

# --- the README

def test_the_readme_is_always_the_same(copy):
    before = (copy/'README.md').read_bytes()
    book.write_readme(copy)
    assert (copy/'README.md').read_bytes()==before
    assert r'![A dot \[dark\]](nbs/index_files/index_1_0.png)' in before.decode() and 'draw()' not in before.decode()

def test_links_of_the_readme_lead_somewhere():
    text, figures = book.readme(root/'nbs')
    links = [l for l in re.findall(r'\]\(([^)\s#]+)', text) if not l.startswith('https:')]
    assert links and [l for l in links if not (root/l).exists() and l not in figures]==[]

def test_the_readme_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = {'resblocks.0.mlp.c_fc.weight': torch.randn(8, 6), 'resblocks.0.mlp.c_fc.bias': torch.randn(8)}
    for name in ('base', 'cars', 'maps'): save_file({k: v if name=='base' else v+.1*torch.randn_like(v) for k, v in base.items()}, f'{name}.safetensors')
    example = re.search(r'```python\n(from safetensors.*?)```', book.readme(root/'nbs')[0], re.S)[1]
    exec(example, {})
    merged = load_file('merged.safetensors')
    assert all(merged[k].shape==v.shape and not torch.equal(merged[k], v) for k, v in base.items())
