"""What the tests in a real Chromium share: the browser, a page that notes what goes wrong, servers on loopback, a JupyterLab."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch

from subspace_nb.book import why_skip

root = Path(__file__).parent.parent
chromium = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)
flags = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
patience = 120_000 # ms

def missing(*packages):
    "What has to be installed beside a Chromium and Playwright, or None."
    if chromium is None: return 'these tests need a Chromium: apt-get install chromium'
    for name in ('playwright', *packages):
        try: __import__(name)
        except ImportError: return f'these tests need the package {name}: pip install {name}'

def needs(*packages): return pytest.mark.skipif(missing(*packages) is not None, reason=str(missing(*packages)))

@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()

@contextmanager
def page_of(browser):
    "A page, and what went wrong on it or left this machine."
    context = browser.new_context(viewport=dict(width=1280, height=800))
    page, wrong = context.new_page(), []
    page.set_default_timeout(patience)
    page.on('console', lambda m: wrong.append(m.text) if m.type=='error' else None)
    page.on('pageerror', lambda e: wrong.append(str(e)))
    page.on('request', lambda r: None if r.url.startswith(('http://127.0.0.1', 'ws://127.0.0.1', 'data:', 'blob:')) else wrong.append(f'asked for {r.url}'))
    try: yield page, wrong
    finally: context.close()

def controls_of(page, within):
    "(role, name, value as said) of each control inside an element, as a screen reader gets them."
    cdp = page.context.new_cdp_session(page)
    node = cdp.send('DOM.querySelector', dict(nodeId=cdp.send('DOM.getDocument')['root']['nodeId'], selector=within))['nodeId']
    of = lambda n, key: n.get(key, {}).get('value')
    return [(of(n, 'role'), of(n, 'name'), next((p['value'].get('value') for p in n.get('properties', []) if p['name']=='valuetext'), None))
            for n in cdp.send('Accessibility.queryAXTree', dict(nodeId=node))['nodes'] if not n.get('ignored') and of(n, 'role') in ('slider', 'textbox', 'combobox', 'listbox', 'spinbutton', 'checkbox', 'button')]

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

@contextmanager
def serving(command, address, cwd, **env):
    "A server and its children, ended together."
    log = open(Path(cwd)/'server.log', 'w')
    server = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | {'PYTHONPATH': str(root), 'OMP_NUM_THREADS': str(torch.get_num_threads())} | env)
    try:
        for _ in range(240):
            try: urlopen(address, timeout=60); break
            except HTTPError: break                       # it answers
            except OSError: assert server.poll() is None, (Path(cwd)/'server.log').read_text(); time.sleep(.5)
        yield
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try: server.wait(10)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL); server.wait()
        log.close()

def put_notebook(folder, name):
    "A copy of a chapter without outputs and without the cells that this machine cannot run, with a kernel that JupyterLab need not ask for."
    book = json.loads((root/f'nbs/{name}.ipynb').read_text(encoding='utf-8'))
    book['metadata']['kernelspec'] = dict(display_name='Python 3 (ipykernel)', language='python', name='python3')
    book['cells'] = [c for c in book['cells'] if c['cell_type']!='code' or not why_skip(''.join(c['source']), torch.cuda.is_available())]
    for cell in book['cells']:
        if cell['cell_type']=='code': cell['outputs'], cell['execution_count'] = [], None
    (Path(folder)/f'{name}.ipynb').write_text(json.dumps(book), encoding='utf-8')

@contextmanager
def jupyterlab(folder, *names):
    "A JupyterLab over copies of these chapters and the results they read; yields its address."
    folder = Path(folder)
    for name in names: put_notebook(folder, name)
    shutil.copytree(root/'nbs/results', folder/'results')
    for name, value in (('apputils-extension/notification', dict(fetchNews='false', checkForUpdates=False)), ('notebook-extension/tracker', dict(windowingMode='none'))):
        path = folder/f'settings/@jupyterlab/{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True); path.write_text(json.dumps(value))
    port = free_port(); address = f'http://127.0.0.1:{port}/'
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', f'--ServerApp.root_dir={folder}', '--IdentityProvider.token=', '--LabApp.expose_app_in_browser=True']
    with serving(command, address+'api', folder, JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(folder/'workspaces'), JUPYTER_PREFER_ENV_PATH='1'): yield address

state = """() => {
    const cells = window.jupyterapp.shell.currentWidget.content.widgets.map(c => c.model).filter(m => m.type=='code' && m.sharedModel.getSource().trim())
    const wrong = cells.flatMap(m => m.outputs.toJSON()).find(o => o.output_type=='error')
    const busy = !document.querySelector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    return wrong ? `${wrong.ename}: ${wrong.evalue}` : !busy && cells.every(m => m.executionCount) ? 'done' : ''
}"""

def run_all(page, address, name, shows, seconds=120):
    "Open a chapter in JupyterLab, run all of it, wait for its widget; no cell may fail."
    page.goto(f'{address}lab/workspaces/{name}/tree/{name}.ipynb')              # a workspace of its own, which reopens no other chapter
    page.wait_for_selector('text=/ipykernel.* . Idle/')
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    found = page.wait_for_function(state, timeout=1000*seconds, polling=250).json_value()
    assert found=='done', f'{name}: {found}'
    page.wait_for_selector(shows)
