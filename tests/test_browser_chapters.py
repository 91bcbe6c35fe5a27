"""The small widgets of the chapters in a real Chromium: JupyterLab runs the chapter, a key moves its control, and the page shows what the modules compute.

With SUBSPACE_NB_SHOTS=folder each widget's page is also saved there as a PNG, to look at."""
import os
import time
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from subspace_nb.alignment import group_alignment, select_experts
from subspace_nb.boost import boost
from subspace_nb.collapse import cosines
from subspace_nb.esm import Steps, layer_factors, merge_matrix, none
from subspace_nb.essential import collect_moments, essential_truncate, truncate, truncation_error
from subspace_nb.experts import Pool
from subspace_nb.hogsvd import generalized_singular_values
from subspace_nb.merge import task_arithmetic
from subspace_nb.score import open_results
from subspace_nb.spectra import energy_rank, singular_values, stable_rank
from subspace_nb.theory import average_bound, orthogonal_components
from browser_help import browser, controls_of, jupyterlab, needs, page_of, run_all

pytestmark = needs('jupyterlab')
shots = os.environ.get('SUBSPACE_NB_SHOTS')
part = 'visual.transformer.resblocks.{}.{}.weight'

@lru_cache(1)
def pool(): return Pool.embedded()

# -- what the modules compute for a setting, by the names on the page

def holding(share, expert):
    dw = pool().task_vector(expert)[part.format(3, 'mlp.c_fc')]
    return {'directions': energy_rank(dw, share), 'of': min(dw.shape)}

def after_boosting(beta, block):
    dw = task_arithmetic(pool().task_vectors(20))[part.format(block, 'mlp.c_fc')]
    s, t = singular_values(dw), singular_values(boost(dw, beta))
    cut = next(i+1 for i in range(len(s)) if s[:i+1].sum()>=beta*s.sum())
    return {'cutoff at i': cut, 'stable rank': stable_rank(dw), 'boosted': stable_rank(boost(dw, beta)), 'σ₁/σᵣ': s[0]/s[-1], 'σ₁/σᵣ boosted': t[0]/t[-1], 'σ₁/Σσ': s[0]/s.sum()}

def after_averaging(n, rho):
    basis = [torch.linalg.qr(torch.randn(m, 3, generator=torch.Generator().manual_seed(m), dtype=torch.float64))[0] for m in (24, 32)]
    c = basis[0]@torch.diag(torch.tensor([1., .6, .3], dtype=torch.float64))@basis[1].mT
    c = c/c.norm()
    parts = orthogonal_components(257, (24, 32), seed=0)
    d = parts[0]-c; d = d/d.norm()
    unique = (1-rho)**.5*torch.stack([e-2*(e*d).sum()*d for e in parts[1:n+1]]).mean(0)
    return {'stable rank': stable_rank(rho**.5*c+unique), 'σ₁': singular_values(rho**.5*c+unique)[0], 'σ₁ of the unique part': singular_values(unique)[0], 'bound': average_bound((1-rho)**.5, n)}

def in_one_basis(first, second, by_all):
    mats = [t[part.format(3, 'attn.out_proj')].double() for t in pool().task_vectors(8 if by_all else [first, second])]
    s = generalized_singular_values(mats)
    far = (s[pool().tasks.index(first)]/s[pool().tasks.index(second)] if by_all else s[0]/s[1]).log().abs()
    return {'directions': 192, 'alike': (far.exp()<=1.1).sum(), 'tenfold or more': (far.exp()>=10).sum(), 'mean |log σ₁/σ₂|': far.mean()}

def chosen_by_cosine(k):
    m = 1-cosines(pool().task_vectors(20)).abs()
    picked = select_experts(m, k)
    return {'chosen': ', '.join(pool().tasks[i] for i in picked), 'their mean alignment': group_alignment(m, picked)}

def cut_to(k, expert, weight):
    dw, x = pool().task_vector(expert)[weight].double(), collect_moments(pool().model(pool().expert(expert)), pool().features(expert, 'proxy'))[weight]
    cuts, whole = {'SVD': truncate(dw, k), 'ESD': essential_truncate(dw, x, k)}, truncation_error(dw, 0*dw, x)
    return {f'error %, {n}': 100*truncation_error(dw, c, x)/whole for n, c in cuts.items()} | {f'weights kept %, {n}': 100*(c.norm()/dw.norm()).square() for n, c in cuts.items()}

def with_levels(variant, task, dimension, layer):
    taus, inputs = pool().task_vectors(8), [pool().inputs(t, 32) for t in pool().tasks[:8]]
    names = [part.format(b, 'mlp.c_proj') for b in range(6)]
    new = {n: merge_matrix([t[n] for t in taus], [x[n] for x in inputs], Steps(**none | dict(task=task, dimension=dimension, layer=layer))) for n in names}
    row = open_results('esm').find(kind='variant', variant=variant, tasks=8)
    return {'merged singular value': singular_values(new[names[3]])[0]*(layer_factors(new)[names[3]] if layer else 1), 'α': row['coefficient'], 'accuracy at 8 tasks, %': row['accuracy']}

# -- the page

def numbers(page): return dict(page.evaluate("[...document.querySelectorAll('.ex [data-name]')].map(e => [e.dataset.name, e.innerText])"))

def agree(found, expected):
    "Whether every expected number stands on the page, to the digits that are written."
    for name, v in expected.items():
        if name not in found: return False
        if isinstance(v, str):
            if found[name]!=v: return False
        elif abs(float(found[name])-float(v))>2e-3*abs(float(v))+1e-9: return False
    return True

def becomes(page, expected, seconds=60):
    "Wait until the page shows these numbers."
    end = time.monotonic()+seconds
    while not agree(numbers(page), expected):
        assert time.monotonic()<end, (numbers(page), {k: v if isinstance(v, str) else float(v) for k, v in expected.items()}, page.locator('.ex').all_inner_texts())
        page.wait_for_timeout(100)

def handle(page, i): return page.locator('.ex .noUi-handle').nth(i)
def readout(page, i): return float(page.locator('.ex .widget-readout').nth(i).inner_text())
def picture(page): return page.locator('.ex img.ex-picture').get_attribute('src')
def alt(page): return page.locator('.ex img.ex-picture').get_attribute('alt')

def press(page, element, key, times=1):
    "By keyboard alone: focus, then keys."
    element.focus()
    for _ in range(times): page.keyboard.press(key)

def pick(page, menu, steps=1):
    "By keyboard alone: Space opens a menu, arrows move in it, Enter takes what they reached."
    menu.focus()
    for key in ('Space', *['ArrowDown']*steps, 'Enter'): page.keyboard.press(key); page.wait_for_timeout(150)

def whole(page):
    "Controls, picture and numbers lie inside the window and are not clipped."
    page.locator('.ex').scroll_into_view_if_needed()
    cut = page.evaluate("""() => [...document.querySelectorAll('.ex label, .ex .widget-readout, .ex select, .ex .noUi-target, .ex img.ex-picture, .ex .ex-numbers span')]
        .filter(e => { const r = e.getBoundingClientRect(); return r.width>0 && (r.left<0 || r.right>innerWidth || (e.matches('label, .widget-readout, .ex-numbers span') && e.scrollWidth>e.clientWidth+1 && getComputedStyle(e).display!='inline')) }).map(e => e.outerHTML.slice(0, 120))""")
    assert not cut, cut
    assert page.evaluate("[...document.querySelectorAll('.ex .widget-hslider label, .ex .widget-dropdown label, .ex .widget-checkbox label')].every(e => e.innerText.trim())")

def shoot(page, name):
    if not shots: return
    Path(shots).mkdir(parents=True, exist_ok=True)
    page.locator('.ex').scroll_into_view_if_needed()
    page.screenshot(path=f'{shots}/{name}.png')

def move_energy(page):
    first, second = pool().tasks[:2]
    becomes(page, holding(.5, first)); yield
    press(page, handle(page, 0), 'ArrowRight', 3)
    becomes(page, holding(.65, first)); assert readout(page, 0)==.65; yield
    pick(page, page.locator('.ex select').first)
    becomes(page, holding(.65, second)); yield

def move_boost(page):
    becomes(page, after_boosting(.05, 3)); yield
    press(page, handle(page, 0), 'ArrowRight', 4)
    becomes(page, after_boosting(.2, 3)); assert readout(page, 0)==.2; yield
    pick(page, page.locator('.ex select'))
    becomes(page, after_boosting(.2, 4)); yield

def move_theory(page):
    becomes(page, after_averaging(16, .3)); yield
    press(page, handle(page, 0), 'ArrowRight', 3)
    becomes(page, after_averaging(48, .3)); yield
    press(page, handle(page, 1), 'ArrowLeft', 3)
    becomes(page, after_averaging(48, .1)); assert (readout(page, 0), readout(page, 1))==(48, .1); yield

def move_hogsvd(page):
    a, b, c = pool().tasks[:3]
    becomes(page, in_one_basis(a, b, False)); yield
    pick(page, page.locator('.ex select').nth(1))
    becomes(page, in_one_basis(a, c, False)); yield
    press(page, page.locator('.ex input[type=checkbox]'), 'Space')
    becomes(page, in_one_basis(a, c, True)); yield

def move_alignment(page):
    chosen = lambda n: page.wait_for_function(f"document.querySelector('.ex [data-name=chosen]').innerText.split(', ').length=={n}")
    chosen(8); first = numbers(page)['chosen']; yield
    press(page, handle(page, 0), 'ArrowRight', 2)
    chosen(10); assert numbers(page)['chosen'].startswith(first) and readout(page, 0)==10; yield               # greedy adds
    pick(page, page.locator('.ex select'), 4)
    becomes(page, chosen_by_cosine(10)); yield

def move_essential(page):
    fc, proj = part.format(3, 'mlp.c_fc'), part.format(3, 'mlp.c_proj')
    becomes(page, cut_to(10, 'animals', fc)); yield
    press(page, handle(page, 0), 'ArrowLeft', 6)
    becomes(page, cut_to(4, 'animals', fc)); yield
    pick(page, page.locator('.ex select').nth(1))
    becomes(page, cut_to(4, 'animals', proj)); yield

def move_esm(page):
    becomes(page, with_levels('cvpr', True, True, True)); yield
    press(page, page.locator('.ex input[type=checkbox]').nth(0), 'Space')
    becomes(page, with_levels('dimension + layer', False, True, True)); yield
    press(page, page.locator('.ex input[type=checkbox]').nth(2), 'Space')
    becomes(page, with_levels('dimension', False, True, False)); yield

chapters = {'07_widgets': move_energy, '12_boost': move_boost, '11_theory': move_theory, '14_hogsvd': move_hogsvd, '15_alignment': move_alignment, '20_essential': move_essential, '21_esm': move_esm}

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    with jupyterlab(tmp_path_factory.mktemp('lab'), *chapters) as address: yield address

@pytest.mark.parametrize('name', chapters)
def test_chapter(browser, lab, name):
    with page_of(browser) as (page, wrong):
        run_all(page, lab, name, '.ex img.ex-picture', seconds=600)
        whole(page)
        assert all(name.strip() for _, name, _ in controls_of(page, '.ex'))
        seen = []
        for i, _ in enumerate(chapters[name](page)):
            assert picture(page) not in seen, 'the picture did not change'
            assert all(v in alt(page) for v in numbers(page).values())          # the alternative text says the same
            seen.append(picture(page)); shoot(page, f'{name}_{i}')
        said = [value for role, _, value in controls_of(page, '.ex') if role=='slider']
        assert said==[page.locator('.ex .widget-readout').nth(i).inner_text() for i in range(len(said))]
        assert len(seen)==3 and not page.locator('.ex .ex-error').count()
        whole(page)
        page.evaluate('window.jupyterapp.serviceManager.sessions.shutdownAll()')
        assert not wrong, wrong
