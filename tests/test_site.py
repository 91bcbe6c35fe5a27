"""The site: the real book built whole, its links followed, its index of the papers complete, and opened in a real Chromium from the disk."""
import re
from pathlib import Path

import pytest
from nbformat import write
from nbformat.v4 import new_code_cell as code, new_markdown_cell as md, new_notebook, new_output

from browser_help import browser, needs, patience
from subspace_nb import site
from subspace_nb.book import chapters, outside_requests, paper_items
from subspace_nb.spectra import stable_rank

root = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The book as it is in the repository."
    out = tmp_path_factory.mktemp('site')/'book'
    return out, site.build(root, out)

def text_of(out, name): return (out/name).read_text(encoding='utf-8')

# --- the book

def test_every_chapter_and_module_has_its_page(built):
    out, pages = built
    for c in chapters(root/'nbs'): assert f'{c.name}.html' in pages and (out/f'{c.name}.html').is_file()
    modules = {p.stem for p in (root/'subspace_nb').glob('[!_]*.py')}-{'answers'}
    assert {n for n in pages if n.startswith('api-')}=={f'api-{m}.html' for m in modules}
    assert {p.name for p in out.glob('*.html')}==set(pages)

def test_links_lead_somewhere_ids_are_single_and_pictures_have_a_text(built): assert site.site_problems(built[0])==[]

def test_pages_and_their_style_ask_for_nothing(built):
    out, _ = built
    for p in (*out.glob('*.html'), *out.glob('*.css')): assert outside_requests(p.read_text(encoding='utf-8'))==[]

def test_pictures_stand_beside_the_pages(built):
    out, _ = built
    assert len(list((out/'figures').glob('*.png')))>50
    for p in out.glob('*.html'): assert p.stat().st_size<1.5e6 and len(re.findall('base64,[^"]{4000}', p.read_text(encoding='utf-8')))==0

def test_the_reference_says_what_the_source_says(built):
    out, _ = built
    entry = site.soup(text_of(out, 'api-boost.html')).select_one('#boost')
    assert [[c.get_text() for c in r.select('td, th')] for r in entry.select('tbody tr')][1]==['beta', 'float', '0.0', 'share of the sum of singular values that is left as it is, in [0, 1]']
    assert entry.select_one('a[href="papers.html#sb-algorithm-1"]') and entry.select_one('.where a')['href']=='12_boost.html#def-boost'
    assert 'rank_tol:float|None=None' in entry.select_one('.signature').get_text()

def test_chapters_link_to_the_reference_and_back(built):
    out, _ = built
    for module, chapter, name in (('spectra', '00_spectra', 'stable_rank'), ('hogsvd', '14_hogsvd', 'hogsvd'), ('tasks', '01_tasks', 'TaskVector')):
        there = site.soup(text_of(out, f'{chapter}.html')).find(id=f'def-{name}')
        assert there['href']==f'api-{module}.html#{name}'
        assert site.soup(text_of(out, f'api-{module}.html')).find(id=name).select_one('.where a')['href']==f'{chapter}.html#def-{name}'

def test_names_in_the_prose_are_links(built):
    links = site.soup(text_of(built[0], '12_boost.html')).select('a.name')
    assert {'api-boost.html#subspace_boosting'} <= {a['href'] for a in links}

def test_every_public_name_has_an_entry_with_what_it_does():
    for module in ('spectra', 'tasks', 'experts', 'merge', 'plots', 'score', 'exercises', 'widgets', 'collapse', 'theory', 'boost', 'rivals', 'hogsvd', 'alignment', 'essential', 'esm', 'vision', 'stream', 'published', 'hub', 'book', 'site'):
        _, entries = site.reference('subspace_nb', module)
        assert entries
        for e in entries:
            if e.kind!='function': continue
            assert e.doc and e.call.startswith(e.name), e
            assert all(meaning for *_, meaning in e.params), e

@pytest.mark.parametrize('module', sorted({p.stem for p in (root/'subspace_nb').glob('[!_]*.py')}-{'answers'}))
def test_options_that_are_passed_on_say_what_they_may_be(module):
    forwards = {('to', '*args'), ('to', '**kwargs'), ('forward', '*args'), ('forward', '**kwargs')} # to torch, whose names they are
    for e in site.reference('subspace_nb', module)[1]:
        for x in (e, *e.members): assert all(meaning for name, *_, meaning in x.params if name[0]=='*' and (x.name, name) not in forwards), x

@pytest.mark.parametrize('module, name, param, says', [('stream', 'merge_files', '**options', 'of the method'), ('alignment', 'alignment_matrix', '**kwargs', 'head_width'), ('widgets', 'Explorer', '**controls', 'ipywidget'),
    ('app', 'Playground', '**settings', 'traits'), ('experts', 'write_state', '**metadata', 'strings'), ('experts', 'Pool.from_hub', '**kwargs', 'clip_pool'), ('exercises', 'draw', '*shape', 'of the tensor')])
def test_starred_parameters_on_their_page(built, module, name, param, says):
    entry = site.soup(text_of(built[0], f'api-{module}.html')).find(id=name)
    row, = [r for r in entry.select('tbody tr') if r.td and r.td.get_text()==param]
    assert says in row.select('td')[-1].get_text()

# --- the index of the papers

printed = [f'SB Figure {n}' for n in '1a 1b 1c 2 3 4 5a 5b 6 7 8 9 10 11 12 13'.split()]+[f'SB Table {n}' for n in range(1, 11)]+[f'SB Proposition {n}' for n in range(1, 5)] \
         +['SB Algorithm 1', 'SB Algorithm 2']+[f'SB Equation {n}' for n in range(1, 33)] \
         +[f'ESM Figure {n}' for n in range(1, 14)]+[f'ESM Table {n}' for n in range(1, 9)]+[f'ESM Theorem {n}' for n in range(1, 4)]+['ESM Algorithm 1']

def test_the_list_of_the_papers_is_what_they_print(): assert set(site.catalogue)=={paper_items(p)[0] for p in printed}

def shown():
    found = {}
    for c in chapters(root/'nbs'):
        if c.part:
            for i, p in site.shown_items(c, site.read_notebook(c.path)).items(): found.setdefault(i, []).append(p)
    return found

def test_every_item_is_shown_or_excused(): assert site.index_gaps(shown())==[]

def test_every_item_has_its_line_and_its_places_exist(built):
    out, _ = built
    index = site.soup(text_of(out, 'papers.html'))
    ids = {}
    for item in site.catalogue:
        row = index.find(id=item.anchor)
        links = [a['href'] for a in row.select('td:last-child a')]
        assert links or len(row.select_one('.absent').get_text())>30, item
        for link in links:
            page, _, anchor = link.partition('#')
            if page not in ids: ids[page] = set(re.findall('id="([^"]*)"', text_of(out, page)))
            assert anchor==item.anchor and anchor in ids[page], item

@pytest.mark.parametrize('drop, add, said', [('SB Figure 1a', None, 'Figure 1a is in no chapter'), (None, 'SB Figure 14', 'Figure 14 is not in the list'), (None, 'ESM Table 8', 'Table 8 is said to be absent, but toy')])
def test_gaps_of_the_index_are_found(drop, add, said):
    place = site.Place(site.Chapter(Path('toy.ipynb'), 'Toy', ''), 'Here', 'x')
    items = [i for i in site.catalogue if i not in site.absent and i not in (paper_items(drop) if drop else [])]+(paper_items(add) if add else [])
    found = site.index_gaps({i: [place] for i in items})
    assert len(found)==1 and said in found[0]

# --- its parts

@pytest.mark.parametrize('a, text', [(int, 'int'), (None, ''), ('Tensor', 'Tensor'), (dict[str, Path], 'dict[str, Path]'), (Path|None, 'Path|None'), (list, 'list'), (list[int], 'list[int]')])
def test_types(a, text): assert site.type_text(a)==text

@pytest.mark.parametrize('v, text', [(stable_rank, 'stable_rank'), (1e-12, '1e-12'), ('x', "'x'"), (Path('/somewhere'), type(Path()).__name__), (object(), 'object'), (list(range(99)), str(list(range(99)))[:47]+'…'), (None, 'None')])
def test_defaults(v, text): assert site.default_text(v)==text

def test_a_class_shows_its_methods():
    class Box:
        "Holds."
        def __init__(self, size:int=3): pass # how much it holds
        def put(self,
            x:int, # what
        )->bool: # whether it fits
            "Put in."
        @property
        def full(self)->bool: "Whether it is."
        @classmethod
        def of(cls, x:int): "Made of."
        def _secret(self): pass
    e = site.describe('Box', Box)
    assert (e.kind, e.doc, e.call)==('class', 'Holds.', 'Box(size:int=3)')
    assert [(m.name, m.kind, m.doc) for m in e.members]==[('put', 'method', 'Put in.'), ('full', 'property', 'Whether it is.'), ('of', 'method', 'Made of.')]
    assert e.members[0].params==[('x', 'int', '', 'what')] and e.members[0].returns==('bool', 'whether it fits')
    html = site.entry_html(e)
    assert 'id="Box.put"' in html and '_secret' not in html

def test_starred_parameters_keep_their_stars_and_their_meaning():
    def f(
        x:int, # a number
        *rest:float, # more numbers
        last=3, # one by name
        # what is handed on, such as `*` or "#1"
        **more
    ): pass
    assert site.describe('f', f).params==[('x', 'int', '', 'a number'), ('*rest', 'float', '', 'more numbers'), ('last', 'int', '3', 'one by name'), ('**more', '', '', 'what is handed on, such as `*` or "#1"')]
    class Kept:
        def __init__(self,
            **settings, # what to keep
        ): pass
    assert site.describe('Kept', Kept).params==[('**settings', '', '', 'what to keep')]

def test_a_class_without_a_constructor_of_its_own_has_no_parameters():
    class Trouble(ValueError): "Goes wrong."
    class Empty: "Holds nothing."
    for c in (Trouble, Empty, int): assert site.describe(c.__name__, c).params==[]

def test_a_long_signature_has_a_line_for_each_parameter():
    def f(first:int, *rest:int, third_parameter_of_many:float=1., fourth_parameter_of_many:str='x', **more): pass
    assert site.signature_text('f', f).splitlines()==['f(', '    first:int,', '    *rest:int,', '    third_parameter_of_many:float=1.0,', "    fourth_parameter_of_many:str='x',", '    **more)']

def test_what_looks_like_html_in_a_docstring_is_shown_as_it_is():
    def f(x): "Where `a<b` & <b>c</b>.\n\nSecond."
    html = site.entry_html(site.describe('f', f))
    assert '<code>a&lt;b</code> &amp; &lt;b&gt;' in html and '<p>Second.</p>' in html

@pytest.mark.parametrize('text, links', [('(Subspace Boosting, Eqs. 31 and 32)', ['sb-equation-31']), ('(ESM, Theorem 1)', ['esm-theorem-1']), ('(SB, Fig. 1a; Alg. 2)', ['sb-figure-1a', 'sb-algorithm-2']), ('(TSV, Eq. 2)', []), ('(ESM, Eq. 3)', []), ('Eq. 2', [])])
def test_citations(text, links): assert [a['href'] for a in site.soup(site.link_papers(text)).select('a')]==[f'papers.html#{l}' for l in links]

dot = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='

@pytest.fixture
def toy(tmp_path):
    "A book of one chapter and an index."
    (tmp_path/'nbs').mkdir(); (tmp_path/'nbs/data').mkdir()
    (tmp_path/'LICENSE').write_text('free'); (tmp_path/'nbs/data/a b.csv').write_text('1')
    write(new_notebook(cells=[md('# One\n> First\n\n[licence](../LICENSE) [data](data/a%20b.csv) [folder](data) [index](index.ipynb#All) [net](https://example.org)'), md('## Twice'), md('## Twice'),
                              code('#| fig-alt: A dot\n#| paper: SB Table 1\nshow()', outputs=[new_output('display_data', {'image/png': dot})]), md('## More <i>x</i> & y\n\nstable rank of $\\sigma$')]), tmp_path/'nbs/00_one.ipynb')
    write(new_notebook(cells=[md('# All\n\n<!-- chapters -->\n- old\n<!-- end of chapters -->')]), tmp_path/'nbs/index.ipynb')
    return tmp_path

def test_a_small_book(toy):
    out = toy/'out'
    site.build(toy, out, lib=None, assets=root/'nbs/site')
    assert site.site_problems(out)==[]
    one, first = site.soup(text_of(out, '00_one.html')), site.soup(text_of(out, 'index.html'))
    assert [a['href'] for a in one.select('main > .cell:first-of-type p a')]==['files/LICENSE.txt', 'files/nbs/data/a%20b.csv', 'index.html#All', 'https://example.org']
    assert [h['id'] for h in one.select('main h2')][:2]==['Twice', 'Twice-2'] and (out/'files/nbs/data/a b.csv').read_text()=='1'
    assert first.select_one('.contents a')['href']=='00_one.html' and 'old' not in first.get_text()
    assert one.select_one('[aria-current=page]')['href']=='00_one.html' and one.select_one('img[alt="A dot"]')

def test_a_search_text_holds_no_markup(toy):
    pages = site.build(toy, toy/'out', lib=None, assets=root/'nbs/site')
    found = site.sections(pages['00_one.html'])
    assert found[-1][1:]==('One', 'More x & y', 'stable rank of σ')

def test_building_again_replaces_a_site_and_nothing_else(toy):
    out = toy/'out'
    site.build(toy, out, lib=None, assets=root/'nbs/site'); (out/'old.html').write_text('')
    site.build(toy, out, lib=None, assets=root/'nbs/site')
    assert not (out/'old.html').exists()
    with pytest.raises(FileExistsError, match='not a site'): site.build(toy, toy/'nbs', lib=None, assets=root/'nbs/site')
    assert (toy/'nbs/index.ipynb').exists()

@pytest.mark.parametrize('html, said', [('<a href="gone.html">x</a>', 'gone.html is not there'), ('<a href="#gone">x</a>', 'no such place'), ('<img src="x.png" alt="">', 'x.png is not there'), ('<img src="data:,">', 'no text'),
                                        ('<script src="//cdn.example/x.js"></script>', 'fetches'), ('<i id="a"></i><b id="a"></b>', 'stands twice'), ('<a href="mailto:x@y">x</a><a href="https://x.org">x</a>', None)])
def test_what_is_wrong_with_a_page_is_found(tmp_path, html, said):
    (tmp_path/'a.html').write_text(html)
    found = site.site_problems(tmp_path)
    assert len(found)==bool(said) and (not said or said in found[0])

def luminance(colour):
    channel = lambda v: v/12.92 if v<=.03928 else ((v+.055)/1.055)**2.4
    colour = colour if len(colour)==6 else ''.join(2*c for c in colour)
    return sum(w*channel(int(colour[i:i+2], 16)/255) for w, i in ((.2126, 0), (.7152, 2), (.0722, 4)))

def contrast(a, b): hi, lo = sorted((luminance(a), luminance(b)), reverse=True); return (hi+.05)/(lo+.05)

def test_text_stands_out_from_what_is_behind_it(built):
    css = text_of(built[0], 'site.css')
    named = dict(re.findall(r'--(\w+):#(\w{3,6})\b', css))
    for name in ('ink', 'soft', 'link', 'accent'):
        for behind in ('fff', named['tint'], 'e8f0f8', 'eef1f4'): assert contrast(named[name], behind)>=4.5, (name, behind)
    code_colours = re.findall(r'^\.highlight (?!\.w )[^{]*\{[^}]*?(?<![-\w])color: #(\w{3,6})\b(?![^}]*background)', css, re.M)
    assert len(code_colours)>20
    for c in code_colours: assert contrast(c, named['tint'])>=4.5, c

# --- in a browser

@needs()
def test_in_chromium_from_the_disk(built, browser):
    out, pages = built
    address, wrong = out.resolve().as_uri(), []
    page = browser.new_page(viewport=dict(width=1280, height=800)); page.set_default_timeout(patience)
    page.on('console', lambda m: wrong.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: wrong.append(str(e)))
    page.on('requestfailed', lambda r: None if r.failure=='net::ERR_ABORTED' else wrong.append(f'failed: {r.url}, {r.failure}')) # aborted: the page was left
    page.on('request', lambda r: None if r.url.startswith((address, 'data:')) else wrong.append(f'asked for {r.url}'))
    fits = lambda: page.evaluate('document.documentElement.scrollWidth<=innerWidth')
    for width, height in ((1280, 800), (390, 844)):
        page.set_viewport_size(dict(width=width, height=height))
        for name in pages if width==1280 else ('index.html', 'papers.html', '12_boost.html', '11_theory.html', 'api-hogsvd.html'):
            page.goto(f'{address}/{name}', wait_until='load')
            assert fits(), f'{name} is wider than {width}'
    # every picture of a page is there
    page.set_viewport_size(dict(width=1280, height=800))
    page.goto(f'{address}/12_boost.html')
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading='eager')")
    page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth>0)")
    # search by keyboard alone, from the disk
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.className')=='skip'
    page.keyboard.press('/'); page.keyboard.type('stable rank')
    page.wait_for_selector('#site-results li a')
    texts = page.locator('#site-results li').all_inner_texts()
    assert len(texts)>5 and all('stable' in t.lower() for t in texts[:5])
    assert 'spectra' in ' '.join(page.locator('#site-results li a').evaluate_all('links => links.map(a => a.href)')[:8])
    page.keyboard.press('ArrowDown')
    target = page.evaluate('document.activeElement.href')
    page.keyboard.press('Enter'); page.wait_for_url(target)
    page.keyboard.press('/'); page.keyboard.type('zzzzqqqq'); page.wait_for_selector('text=Nothing found')
    page.keyboard.press('Escape'); assert not page.is_visible('#site-results')
    # the menu of a narrow window
    page.set_viewport_size(dict(width=390, height=844))
    assert not page.is_visible('#site-sidebar')
    page.click('#site-menu'); assert page.is_visible('#site-sidebar') and page.get_attribute('#site-menu', 'aria-expanded')=='true'
    page.keyboard.press('Escape'); assert not page.is_visible('#site-sidebar')
    page.close()
    assert not wrong, wrong[:5]
