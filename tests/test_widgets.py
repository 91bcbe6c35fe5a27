"""The explorer without a browser: what is shown belongs to the controls, whatever happens to them."""
import asyncio
import base64
import io
import re
from html import unescape

import ipywidgets as w
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from traitlets import TraitError

from subspace_nb.book import tidy
from subspace_nb.widgets import Explorer, as_text, choice, copy_button, img, png, slider, switch

def draw(ax, x, name='sin', up=False):
    if x==13: raise ValueError('x must not be 13')
    at = np.linspace(0, 1, 20)
    ax.plot(at, {'sin': np.sin, 'cos': np.cos}[name](x*at)*(1 if up else -1)); ax.set(xlabel='t', title=f'{name}, x = {x}')

def numbers(x, name='sin', up=False): return {'twice x': 2*x, 'called': name}

def made(**kw): return Explorer(draw, numbers, 'A wave', size=(3., 2.), **{'x': slider('x', (1., 2., 3., 13.)), 'name': choice('function', ('sin', 'cos')), 'up': switch('upside down')} | kw)

def page(e): return e._page.value
def picture(e): return np.asarray(Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]*)"', page(e))[1]))))
def on_page(e): return {unescape(k): unescape(v) for k, v in re.findall('data-name="([^"]*)">([^<]*)<', page(e))}

def test_page_and_numbers_follow_each_control():
    e = made()
    assert on_page(e)=={'twice x': '2', 'called': 'sin'} and e.drawn==1
    for name, value in (('x', 3.), ('name', 'cos'), ('up', True)):
        before = page(e)
        e.controls[name].value = value
        assert e.settings()[name]==value and page(e)!=before and on_page(e)=={k: as_text(v) for k, v in e.shown().items()}
    assert e.shown()=={'twice x': 6., 'called': 'cos'} and e.drawn==4 and e.seconds>0

@settings(max_examples=8)
@given(st.lists(st.tuples(st.sampled_from(('x', 'name', 'up')), st.integers(0, 3)), max_size=4))
def test_whatever_is_moved_the_screen_is_of_the_last_setting(moves):
    e = made()
    for name, i in moves:
        e.controls[name].value = {'x': (1., 2., 3., 13.), 'name': ('sin', 'cos')*2, 'up': (False, True)*2}[name][i]
    s = e.settings()
    if s['x']==13: assert e.shown()=={} and 'must not be 13' in e.error and 'img' not in page(e)
    else:
        assert e.shown()==numbers(**s) and e.error is None
        assert on_page(e)=={k: as_text(v) for k, v in numbers(**s).items()}

def test_a_picture_drawn_again_is_the_picture_drawn_first():
    e, first = made(), made(x=slider('x', (1., 2.), 2.))
    e.controls['x'].value = 2.
    assert np.abs(picture(e).astype(int)-picture(first)).mean()<8          # labels may sit a pixel apart
    e.controls['x'].value = 1.
    assert not np.array_equal(picture(e), picture(first))

def test_no_label_is_cut_off_when_labels_grow():
    e = Explorer(lambda ax, x: ax.plot([0, x], [-x, x]), lambda x: {}, size=(3., 2.), x=slider('x', (1., 1e5, 2.)))
    e.controls['x'].value = 1e5
    assert (picture(e)[:, :2]==255).all() and (picture(e)[:, 2:60]<255).any()

def test_of_many_changes_the_last_is_drawn():
    async def drag():
        e = made()
        for v in (2., 3., 1., 2., 3.): e.controls['x'].value = v
        assert e.drawn==1                                                 # nothing yet
        await asyncio.sleep(.1)
        assert e.drawn==2 and e.shown()['twice x']==6.
        e.controls['x'].value = 1.
        assert e.shown()['twice x']==2. and e.drawn==3                    # `shown` does not wait
        await asyncio.sleep(.1)
        assert e.drawn==3                                                 # and nothing is drawn twice
    asyncio.run(drag())

def test_an_error_takes_the_place_of_the_picture_and_goes():
    e = made()
    e.controls['x'].value = 13.
    assert e.shown()=={} and e.error=='ValueError: x must not be 13' and 'role="alert"' in page(e) and 'img' not in page(e) and not on_page(e)
    e.controls['x'].value = 2.
    assert e.error is None and e.shown()['twice x']==4. and 'alert' not in page(e)

def test_an_error_in_the_numbers_or_at_the_start():
    e = Explorer(draw, lambda x: {'1/x': 1/x}, x=slider('x', (0., 1.)))
    assert 'ZeroDivisionError' in e.error and e.shown()=={}
    e.controls['x'].value = 1.
    assert e.shown()=={'1/x': 1.}

def test_alternative_text_says_setting_and_numbers():
    e = made()
    e.controls['name'].value = 'cos'
    alt = unescape(re.search('alt="([^"]*)"', page(e))[1])
    assert alt.startswith('A wave. ') and all(t in alt for t in ('x: 1', 'function: cos', 'upside down: off', 'twice x: 2'))

def test_hostile_names_stay_text():
    e = Explorer(lambda ax, x: None, lambda x: {'<b>': '"&<script>'}, '<i>"', x=slider('<u>', (1., 2.)))
    assert '<script>' not in page(e) and '<i>' not in page(e) and on_page(e)=={'<b>': '"&<script>'}

def test_still_is_the_same_picture(capsys):
    plt.close('all')
    e = made(); e.controls['x'].value = 3.
    e.still()
    assert len(plt.get_fignums())==1 and plt.gcf().axes[0].get_title()=='sin, x = 3.0'
    assert capsys.readouterr().out.strip()=='x: 3; function: sin; upside down: off; twice x: 6; called: sin'
    plt.close('all'); made()
    assert not plt.get_fignums()                                          # the widget's own figure is not shown beside it

def test_several_panels_and_extra_axes():
    def three(axes, x):
        im = axes[0].imshow(np.ones((3, 3))*x); axes[0].figure.colorbar(im, ax=axes[0]); axes[1].twinx().plot([1, x])
    e = Explorer(three, lambda x: {}, cols=2, size=(2., 2.), x=slider('x', (1., 2., 3.)))
    for x in (2., 3., 1.): e.controls['x'].value = x; assert e.error is None and len(e._figure.axes)==4
    assert picture(e).shape[:2]==(300, 600)

def test_the_page_gets_its_script():
    (out,) = [c for c in made().children if isinstance(c, w.Output)]
    assert out.outputs[0]['data']['application/javascript'].count('{')==out.outputs[0]['data']['application/javascript'].count('}')
    assert 'nb-copy' in copy_button()._dom_classes

def test_controls_are_named_and_hinted():
    for c in made().controls.values(): assert c.description and c.tooltip
    assert slider('β', (1, 2), tip='threshold').tooltip=='threshold'
    with pytest.raises(TraitError): made().controls['x'].value = 1.5

@pytest.mark.parametrize('bad', [{}, dict(x=3), dict(x=w.HTML), dict(x=w.HBox())])
def test_refused_controls(bad):
    with pytest.raises(TypeError, match='controls'): Explorer(draw, numbers, **bad)

@pytest.mark.parametrize('make', [lambda: slider('β', []), lambda: slider('β', (1., 2.), 3.), lambda: choice('b', {}), lambda: choice('b', ('x',), 'y')])
def test_refused_values(make):
    with pytest.raises(ValueError, match='value'): make()

@pytest.mark.parametrize('x, text', [(3, '3'), (.12345678, '0.1235'), (1e-9, '1e-09'), (torch.tensor(2.5), '2.5'), (np.float64(.1), '0.1'), (np.int64(7), '7'), ('a b', 'a b'), (True, 'True'), (float('inf'), 'inf'), (None, 'None')])
def test_as_text(x, text): assert as_text(x)==text

def test_png_keeps_pixels():
    x = np.random.RandomState(0).randint(0, 256, (5, 7, 4), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(x)))), x[..., :3])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(x[..., 0])))), x[..., 0])
    assert 'width="30"' in img(b'', '', width=30)

def test_a_page_without_a_kernel_has_a_sentence_in_its_place():
    import nbformat
    out = nbformat.v4.new_output('display_data', {'application/vnd.jupyter.widget-view+json': {'model_id': 'x'}, 'text/plain': repr(made())[:40]})
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('e', outputs=[out])])
    (kept,) = tidy(nb).cells[0].outputs
    assert kept.data['text/plain'].startswith('A widget: run this cell')
