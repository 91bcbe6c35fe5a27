"""The playground in a real Chromium: served by Voilà, and as a chapter in JupyterLab. Numbers on the page are compared with the modules'."""
import socket
import sys

import pytest
import torch

from subspace_nb.app import Engine, Settings, betas
from subspace_nb.experts import Pool, read_state
from browser_help import browser, controls_of, free_port, jupyterlab, needs, page_of, run_all, serving

pytestmark = needs('voila', 'jupyterlab')

@pytest.fixture(scope='module')
def engine(): return Engine(Pool.embedded())

def number(page, name): return float(page.inner_text(f'.pg-{name}').rstrip('%'))

def check_screen(page, engine, s):
    "The numbers on the page are those of the settings."
    label = 'visual.transformer.resblocks.2.mlp.c_fc.weight'
    before, after, _ = engine.spectrum(s, label)
    ranks = engine.ranks(s)
    scores = engine.pool.evaluate(engine.state(s), list(s.experts))
    assert page.inner_text('.pg-settings')==str(s)
    for name, value, tol in (('top', before[0], 2e-4), ('low-before', before[-1], 2e-4), ('low-after', after[-1], 2e-4), ('rank-before', ranks.before.mean(), .02), ('rank-after', ranks.after.mean(), .02),
                             ('mean', 100*scores.loc['mean', 'normalised'], .02), ('accuracy', 100*scores.loc['mean', 'accuracy'], .02)):
        assert abs(number(page, name)-float(value))<tol, name

def settled(page):
    "Wait until the screen is up to date, for the β that its slider is at."
    page.wait_for_timeout(250)
    page.wait_for_function("""betas => {
        const at = document.querySelector('.pg-controls .noUi-handle'), typed = document.querySelector('.pg-controls input[type=text]')
        const beta = betas[Math.round(parseFloat(at.getAttribute('aria-valuenow')))]
        return document.querySelector('.pg-done') && Math.abs(beta-parseFloat(typed.value))<1e-9 && document.querySelector('.pg-settings').innerText.includes(`β = ${beta},`)
    }""", arg=list(betas))

def typed_beta(page): return float(page.locator('.pg-controls input[type=text]').first.input_value())

def handle(page): return page.locator('.pg-controls .noUi-handle').first

def nothing_cut_off(page):
    "Every control and picture lies inside the window, from left to right, and no button's text is cut, once the page has followed its size."
    page.wait_for_function("""() => document.documentElement.scrollWidth<=innerWidth && [...document.querySelectorAll('.pg-controls button, .pg-controls select, .pg-controls input, .pg-panel, .pg textarea')]
        .map(e => e.getBoundingClientRect()).every(r => r.width==0 || (r.left>=0 && r.right<=innerWidth+1))
        && [...document.querySelectorAll('.pg button')].every(b => b.scrollWidth<=b.clientWidth+1)""", timeout=10_000)

def check_named(page, engine):
    "Every control has a name of its own for a screen reader, and a slider says its value and not its position."
    found = controls_of(page, '.pg')
    names = [(role, name) for role, name, _ in found]
    assert all(name.strip() for _, name in names) and len(set(names))==len(names)
    assert {role: sum(r==role for r, _ in names) for role in ('slider', 'combobox', 'listbox', 'spinbutton')}=={'slider': 4, 'combobox': 4, 'listbox': 1, 'spinbutton': 1}
    assert {name: value for role, name, value in found if role=='slider'}['boost, β']==f'{typed_beta(page):.4g}'

def check_copied(page):
    "The button puts the code on the clipboard."
    page.context.grant_permissions(['clipboard-read', 'clipboard-write'])
    page.evaluate("navigator.clipboard.writeText('')")
    page.get_by_role('button', name='Copy', exact=True).click(); page.wait_for_selector('text=Copied')
    text = page.evaluate('navigator.clipboard.readText()')
    assert text and text==page.locator('.pg textarea').input_value()
    return text

def test_voila(browser, engine, tmp_path):
    port = free_port(); address = f'http://127.0.0.1:{port}/'
    with serving([sys.executable, '-m', 'subspace_nb.app', '--port', str(port)], address+'voila/static/spinner.css', tmp_path), page_of(browser) as (page, wrong):
        page.goto(address); page.wait_for_selector('.pg-head')
        tick = lambda text: page.get_by_label(text, exact=True).click()
        button = lambda text: page.get_by_role('button', name=text, exact=True).click()
        menu = lambda i, value: page.locator('.pg-controls select').nth(i).select_option(value)
        names = engine.pool.tasks
        for i in (8, 7, 6, 5, 4, 8, 8): tick(f'{i} {names[i-1]}')            # quickly, while the first numbers are still being computed
        settled(page)
        three = tuple(names[:3])
        check_screen(page, engine, Settings(three))
        for width, height in ((1920, 1080), (1280, 800)): page.set_viewport_size(dict(width=width, height=height)); nothing_cut_off(page)
        fits = lambda: page.evaluate("document.querySelector('.pg').getBoundingClientRect().bottom<=innerHeight")
        assert fits(); check_named(page, engine)
        assert page.locator('.pg-at-spectrum img').get_attribute('alt').startswith('Block 2, mlp.c_fc')
        # β by keyboard
        first = page.locator('.pg-at-spectrum img').get_attribute('src')
        handle(page).focus()
        for _ in range(20): page.keyboard.press('ArrowRight')
        settled(page)
        assert typed_beta(page)==betas[20]
        check_screen(page, engine, Settings(three, beta=betas[20]))
        second = page.locator('.pg-at-spectrum img').get_attribute('src')
        assert first!=second
        # β by drag
        box, track = handle(page).bounding_box(), page.locator('.pg-controls .noUi-base').first.bounding_box()
        page.mouse.move(box['x']+box['width']/2, box['y']+box['height']/2); page.mouse.down()
        for share in (.6, .65, .7, .75, .8): page.mouse.move(track['x']+share*track['width'], box['y']+box['height']/2)
        page.mouse.up()
        settled(page)
        beta = typed_beta(page)
        assert beta in betas and abs(betas.index(beta)-.8*(len(betas)-1))<=1.5
        check_screen(page, engine, Settings(three, beta=beta))
        assert second!=page.locator('.pg-at-spectrum img').get_attribute('src')
        # code and weights
        check_named(page, engine)
        text = check_copied(page)
        exec(text.rpartition('\n')[0], made := {})
        button('Save'); page.wait_for_selector('.pg-saved')
        assert page.inner_text('.pg-saved').startswith(f'saved {tmp_path}/merged.safetensors,') and fits()       # where the server was started
        saved, ref = read_state(tmp_path/'merged.safetensors'), engine.state(Settings(three, beta=beta))
        for k in ref: assert torch.allclose(made['state'][k], ref[k], atol=1e-5) and torch.allclose(saved[k], ref[k], atol=1e-5)
        button('Save'); page.wait_for_selector('.pg-error'); assert 'exists' in page.inner_text('.pg-error') and fits()
        # the same line of what was tried, twice
        tried = page.locator('.pg-mono select')
        for _ in range(2):
            tried.select_option(index=next(i for i, t in enumerate(tried.locator('option').all_inner_texts()) if f'β={betas[20]:g}' in t.split())); settled(page)
            assert typed_beta(page)==betas[20]
            handle(page).focus(); page.keyboard.press('Home'); settled(page)
        # what makes no model
        for i in (2, 3): tick(f'{i} {names[i-1]}')
        menu(0, 'Consensus'); page.wait_for_selector('.pg-error >> text=two at least')
        assert page.locator('.pg-stale.pg-empty').count()==5 and not page.locator('.pg-mean').count() and not page.locator('.pg textarea').input_value() and fits()
        button('Other images'); page.wait_for_timeout(300); assert page.locator('.pg-error').count()==1
        button('first 20'); menu(0, 'TSV-M'); page.wait_for_selector('.pg-error >> text=more than the singular values')
        button('Reset'); page.wait_for_selector('.pg-error', state='detached')
        # a number that is none
        box = page.get_by_label('α auto: number', exact=True); box.fill('nan'); page.keyboard.press('Enter')
        page.wait_for_function("document.querySelector('.pg-settings').innerText.includes('α = 0.2263') && [...document.querySelectorAll('.pg-controls input[type=text]')].some(i => i.value=='0.2263')")
        settled(page)
        assert not wrong, wrong

def test_a_second_server_takes_the_next_port(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen(); port = s.getsockname()[1]
        after = next(p for p in range(port+1, port+50) if not listens(p))
        with serving([sys.executable, '-m', 'subspace_nb.app', '--port', str(port)], f'http://127.0.0.1:{after}/voila/static/spinner.css', tmp_path):
            assert f'http://127.0.0.1:{after}/ ' in (tmp_path/'server.log').read_text()

def listens(port):
    with socket.socket() as s: return s.connect_ex(('127.0.0.1', port))==0

def test_jupyterlab(browser, engine, tmp_path):
    with jupyterlab(tmp_path, '40_playground') as address, page_of(browser) as (page, wrong):
        run_all(page, address, '40_playground', '.pg-head'); page.wait_for_selector('.pg-done')
        page.get_by_role('button', name='Reset', exact=True).click(); settled(page)
        page.get_by_role('button', name='none', exact=True).click(); page.wait_for_selector('.pg-error')
        for i in (1, 2): page.get_by_label(f'{i} {engine.pool.tasks[i-1]}', exact=True).click()
        settled(page)
        first = page.locator('.pg-at-spectrum img').get_attribute('src')
        handle(page).focus()
        for _ in range(24): page.keyboard.press('ArrowRight')
        settled(page)
        check_screen(page, engine, Settings(tuple(engine.pool.tasks[:2]), beta=typed_beta(page)))
        assert typed_beta(page)==betas[24] and first!=page.locator('.pg-at-spectrum img').get_attribute('src')
        nothing_cut_off(page); check_named(page, engine); check_copied(page)
        assert not wrong, wrong
