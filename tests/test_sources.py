"Sources of the pool: fetching, reading, grouping and drawing, all without a network."
import gzip, io, os, pickle, re, sys, tarfile, zipfile
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from subspace_nb import zoo_sources as z

def zip_of(path, **members):
    with zipfile.ZipFile(path, 'w') as f:
        for k, v in members.items(): f.writestr(zipfile.ZipInfo(k), v)
    return path

@pytest.fixture
def registry(monkeypatch):
    "A registry with one package of one file; counts its downloads."
    calls = []
    def download(kind, name, version, folder):
        calls.append(name)
        if name=='offline': raise RuntimeError('no network')
        return zip_of(folder/f'{Path(name).name}.whl', data='hello')
    monkeypatch.setattr(z, 'download', download)
    return calls

# --- fetching

def test_fetch_once(registry, tmp_path):
    out = z.fetch('pypi', 'thing', '1', tmp_path)
    assert (out/'files/data').read_text()=='hello' and re.fullmatch('[0-9a-f]{64}  thing.whl', (out/'sha256').read_text())
    assert sorted(p.name for p in out.iterdir())==['files', 'sha256']
    assert z.fetch('pypi', 'thing', '1', tmp_path)==out and registry==['thing']

def test_fetch_relative_cache(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (z.fetch('pypi', 'thing', '1', 'here')/'files/data').exists() and (tmp_path/'here').is_dir()

def test_seal(registry, tmp_path):
    got = (z.fetch('pypi', 'thing', '1', tmp_path/'a')/'sha256').read_text().split()[0]
    z.fetch('pypi', 'thing', '1', tmp_path/'b', sha256=got)
    with pytest.raises(ValueError, match='pypi-thing-1.*'+got): z.fetch('pypi', 'thing', '1', tmp_path/'c', sha256='0'*64)
    assert not list((tmp_path/'c').iterdir())
    with pytest.raises(ValueError, match='pypi-thing-1'): z.fetch('pypi', 'thing', '1', tmp_path/'a', sha256='0'*64) # also in the cache

@pytest.mark.parametrize('name', ['mnist', 'kanjivg', 'pychess'])
def test_known_packages_are_sealed(registry, tmp_path, name):
    with pytest.raises(ValueError, match=f'{name}.*{z.PACKAGES[name].sha256}'): z.files(name, tmp_path)
    assert not list(tmp_path.iterdir())

def test_nothing_partial(registry, tmp_path):
    with pytest.raises(RuntimeError, match='no network'): z.fetch('npm', 'offline', '1', tmp_path)
    assert not list(tmp_path.iterdir())
    left = tmp_path/'npm-thing-1.part/files'; left.mkdir(parents=True); (left/'half').write_text('')
    out = z.fetch('npm', 'thing', '1', tmp_path)
    assert [p.name for p in tmp_path.iterdir()]==['npm-thing-1'] and not (out/'files/half').exists()

def test_scoped_npm_name(registry, tmp_path):
    assert z.fetch('npm', '@a/b', '1', tmp_path).name=='npm-a_b-1'

def test_download_refuses(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='deb, npm or pypi'): z.download('conda', 'a', '1', tmp_path)
    monkeypatch.setenv('PATH', '')
    with pytest.raises(RuntimeError, match='apt-get is not installed.*nothing=1'): z.download('deb', 'nothing', '1', tmp_path)

def test_unpack_stays_inside(tmp_path):
    with tarfile.open(tmp_path/'bad.tgz', 'w:gz') as t: t.addfile(tarfile.TarInfo('../escaped'), io.BytesIO())
    with pytest.raises(ValueError, match='escaped would be written outside'): z.unpack(tmp_path/'bad.tgz', tmp_path/'out')
    with tarfile.open(tmp_path/'link.tgz', 'w:gz') as t:
        link = tarfile.TarInfo('inside'); link.type, link.linkname = tarfile.SYMTYPE, '../../etc'
        t.addfile(link)
    with pytest.raises(ValueError, match='inside would be written outside'): z.unpack(tmp_path/'link.tgz', tmp_path/'out')
    with tarfile.open(tmp_path/'good.tgz', 'w:gz') as t: t.addfile(tarfile.TarInfo('a/b'), io.BytesIO())
    z.unpack(tmp_path/'good.tgz', tmp_path/'good'); assert (tmp_path/'good/a/b').exists()
    z.unpack(zip_of(tmp_path/'bad.zip', **{'../escaped': 'x'}), tmp_path/'out')
    assert not (tmp_path/'escaped').exists()

@pytest.mark.parametrize('call,package', [
    (lambda: z.draw_svg('<svg/>', 8), 'resvg-py'), (lambda: z.has('no.ttf', 'a'), 'fonttools'), (lambda: z.optical('.'), 'scikit-learn'),
    (lambda: z.need('rdata', 'rdata'), 'rdata')])
def test_missing_package_says_what_to_install(monkeypatch, call, package):
    for m in ('resvg_py', 'fontTools.ttLib', 'sklearn.datasets', 'rdata'): monkeypatch.setitem(sys.modules, m, None)
    with pytest.raises(ModuleNotFoundError, match=f'pip install {package}'): call()

# --- the lists

def test_sources_and_notices():
    assert set(z.SOURCES)==set(z.ABOUT) and len(z.SOURCES)>=30
    for a in z.ABOUT.values():
        assert a['title'] and a['licence'] and a['source'] and len(set(a['classes']))==len(a['classes'])>1
        assert a['kind'] in ('photograph', 'handwriting', 'drawing', 'remote sensing', 'print', 'artwork')
    assert len({a['title'] for a in z.ABOUT.values()})==len(z.ABOUT)
    assert all(p.words and p.kind in ('deb', 'npm', 'pypi') for p in z.PACKAGES.values())

def test_no_pickles_and_nothing_from_the_builder():
    root = Path(z.__file__).parent
    assert not [p for p in root.rglob('*') if p.suffix in ('.pkl', '.pickle', '.pt', '.pth', '.bin')]
    assert 'zoo_build' not in Path(z.__file__).read_text('utf-8')

# --- reading

def images(**kw):
    return z.Images(**dict(x=np.zeros((2, 32, 32), np.uint8), y=np.array([0, 1]), classes=['a', 'b'], group=None, source='', licence='', kind='print', title='t')|kw)

@pytest.mark.parametrize('kw,match', [
    (dict(x=np.zeros((2, 32, 32))), 'x must be'), (dict(x=np.zeros((2, 28, 28), np.uint8)), 'x must be'), (dict(x=np.zeros((2, 32, 32, 4), np.uint8)), 'x must be'),
    (dict(y=np.array([0])), 'y must have shape'), (dict(y=np.array([0, 2])), 'y must lie'), (dict(y=np.array([-1, 0])), 'y must lie'), (dict(group=np.zeros(3, int)), 'group must')])
def test_images_refuses(kw, match):
    with pytest.raises(ValueError, match=match): images(**kw)

def test_images_shows_itself():
    assert 'split freely' in repr(images()) and '2 groups' in repr(images(group=np.array([4, 7])))

def gz(path, obj): path.write_bytes(gzip.compress(pickle.dumps(obj, 4))); return path

class Calls:
    def __init__(self, f, *args): self.how = f, args
    def __reduce__(self): return self.how

@pytest.mark.parametrize('f', [os.system, eval, np.load, np.fromfile, np.frompyfunc, getattr])
def test_unpickler_refuses(tmp_path, f):
    with pytest.raises(pickle.UnpicklingError, match='not allowed'): z.array_pickle(gz(tmp_path/'a.gz', Calls(f, 'x')))

@settings(max_examples=20, deadline=None)
@given(st.sampled_from(['u1', 'i8', 'f4', '>i2']), st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_unpickler_reads_arrays(dtype, shape):
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        a = np.arange(np.prod(shape)).reshape(shape).astype(dtype); b = z.array_pickle(gz(Path(d)/'a.gz', a))
    assert a.dtype.kind==b.dtype.kind and a.shape==b.shape and (a==b).all()

def test_climate_grid(tmp_path):
    (tmp_path/'kg_zoneNum.csv').write_text('id,zone,num\n0,Af,1\n1,EF,2\n2,Ocean,3')
    Image.fromarray(np.array([[1, 2], [3, 1]], np.uint8)).save(tmp_path/'kmz_int_reshape.png')
    assert z.climate_grid(tmp_path, (2, 2)).tolist()==[[0, 5], [-1, 0]]
    assert z.climate_grid(tmp_path, (4, 4))[:2, 2:].tolist()==[[5, 5], [5, 5]]

def test_build_drops_copies_balances_and_numbers_groups():
    rng = np.random.default_rng(0); x = rng.integers(0, 255, (60, 32, 32)).astype(np.uint8); x[50:] = x[:10]
    y = np.repeat([0, 1, 1], 20) ; g = np.arange(60)//6*10
    t = z.build('card_suit', x, y, g); again = z.build('card_suit', x, y, g)
    assert len(t.x)==50 and (t.x==again.x).all() and t.licence==z.ABOUT['card_suit']['licence']
    assert set(t.group)==set(range(len(set(t.group)))) and t.group.dtype==t.y.dtype==np.int64
    where = {o.tobytes(): i for i, o in reversed(list(enumerate(x)))}
    of = [where[o.tobytes()] for o in t.x]
    assert (y[of]==t.y).all() and all((g[of][t.group==k]==g[of][t.group==k][0]).all() for k in set(t.group))

# --- groups

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(st.integers(0, n-1), st.integers(0, n-1)), max_size=12))))
def test_joined_is_the_finest_partition_that_joins_all_pairs(case):
    n, pairs = case; g = z.joined(range(n), pairs)
    assert set(g)==set(range(len(set(g)))) and all(g[i]==g[j] for i, j in pairs)
    reach = np.eye(n, dtype=bool)
    for i, j in pairs: reach[i, j] = reach[j, i] = True
    for _ in range(n): reach = reach@reach
    assert (reach==(g[:, None]==g)).all()

@pytest.mark.parametrize('seed', range(3))
def test_overlay(seed):
    rng = np.random.default_rng(seed); scene = rng.integers(0, 200, (14, 11, 4)).astype(np.int16)
    at = rng.permutation([(r, c) for r in range(12) for c in range(9)])
    place = z.overlay(np.stack([scene[r:r+3, c:c+3] for r, c in at]))
    assert (place==at).all()

def test_overlay_leaves_strangers_out():
    rng = np.random.default_rng(0); scene = rng.integers(0, 200, (5, 5, 4)).astype(np.int16)
    v = [scene[r:r+3, c:c+3] for r in range(3) for c in range(3)]+[rng.integers(200, 255, (3, 3, 4)).astype(np.int16)]
    place = z.overlay(np.stack(v))
    assert (place[:9]==np.array([(r, c) for r in range(3) for c in range(3)])).all() and (place[9]==-1).all()

def test_crops_stay_in_their_block(monkeypatch):
    monkeypatch.setattr(z, 'levelled', lambda c: c)
    img = np.arange(120*170).reshape(120, 170)
    for crop, b in z.crops(img, np.random.default_rng(1), 20, 50, 80): assert len({(r//50, c//50) for r, c in zip(*np.divmod(crop.ravel(), 170))})==1
    one = {}
    for crop, b in z.crops(img, np.random.default_rng(1), 20, 50, 80): one.setdefault(b, set()).add((crop[0, 0]//170//50, crop[0, 0]%170//50))
    assert all(len(v)==1 for v in one.values()) and len(one)==6

def test_flat_crops_are_passed_over():
    assert z.crops(np.zeros((100, 100)), np.random.default_rng(0), 20, 50, 5)==[]

def blob(seed, size=48):
    rng = np.random.default_rng(seed); a = np.zeros((size, size, 4), np.uint8)
    a[..., :3] = np.kron(rng.integers(0, 255, (6, 6, 3)), np.ones((size//6, size//6, 1))); a[4:-4, 4:-4, 3] = 255
    return Image.fromarray(a)

def test_kin_by_name_looks_and_mirror():
    a, b, c = blob(0), blob(1), blob(2); m = a.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert z.kin(['p', 'q', 'r', 's', 'q'], [b, a, m, c, c]).tolist()==[0, 1, 1, 1, 1]
    assert z.kin(['p', 'q', 'r'], [a, b, c]).tolist()==[0, 1, 2]

def test_cutouts_share_groups_among_kin_only(tmp_path):
    for k in range(4): blob(k).save(tmp_path/f'{k}.png')
    (tmp_path/'tiny.png').write_bytes(b''); blob(9).resize((6, 6)).save(tmp_path/'tiny.png')
    fams = {'one': {'a': [tmp_path/'0.png', tmp_path/'1.png'], 'b': [tmp_path/'2.png'], 'c': [tmp_path/'tiny.png']}, 'two': {'a': [tmp_path/'3.png']}}
    x, y, g = z.cutouts(fams, 6)
    assert np.bincount(y).tolist()==[6, 6] and set(g[:6])=={0, 1} and set(g[6:])=={2}
    assert np.stack(x).shape==(12, 32, 32, 3) and (np.stack(x)==np.stack(z.cutouts(fams, 6)[0])).all()

def test_family_names():
    assert z.family(Path('candy_cane_2.png'))==z.family(Path('candy_cane.png'))!=z.family(Path('candy.png'))
    assert z.family(Path('flower_2.png'))!=z.family(Path('flower_3.png'))
    fams = z.by_family([Path('b1'), Path('a2'), Path('a1'), Path('skip')], z.family, lambda p: p.name=='skip')
    assert fams=={'a': [Path('a1'), Path('a2')], 'b': [Path('b1')]}

# --- drawing

@pytest.fixture(scope='module')
def dejavu():
    import matplotlib
    return Path(matplotlib.get_data_path())/'fonts/ttf'

def test_glyphs(dejavu):
    a = z.glyphs(dejavu/'DejaVuSans.ttf', 'Axg')
    assert [o.size for o in a]==[(z.BIG, z.BIG)]*3 and all(np.asarray(o).max()>200 for o in a)
    assert np.asarray(a[2]).nonzero()[0].max()>np.asarray(a[1]).nonzero()[0].max() # g hangs below the line
    assert z.glyphs(dejavu/'DejaVuSans.ttf', 'a ') is None
    assert z.same(a, a) and not z.same(a, z.glyphs(dejavu/'DejaVuSerif-Bold.ttf', 'Axg'))

def test_has(dejavu):
    pytest.importorskip('fontTools')
    assert z.has(dejavu/'DejaVuSans.ttf', 'Жλ') and not z.has(dejavu/'DejaVuSans.ttf', 'ក')

def test_printed_is_even_and_repeats(dejavu):
    sets = [z.glyphs(dejavu/f'{f}.ttf', 'ab') for f in ('DejaVuSans', 'DejaVuSerif', 'DejaVuSans')]; g = z.font_groups(sets)
    assert g.tolist()==[0, 1, 0] or g.tolist()==[1, 0, 1]
    rows = z.printed(sets, g, 'ab', 40); y, gs = [r[1] for r in rows], [r[2] for r in rows]
    assert len(rows)==40 and {(a, b): 10 for a in (0, 1) for b in (0, 1)}=={k: list(zip(y, gs)).count(k) for k in set(zip(y, gs))}
    assert all((a[0]==b[0]).all() for a, b in zip(rows, z.printed(sets, g, 'ab', 40)))

def test_pen_spares_hairlines():
    a = np.zeros((128, 128), np.uint8); a[:, 64] = 255; im = Image.fromarray(a)
    assert all(np.asarray(z.pen(im, np.random.default_rng(s))).sum()>=a.sum()*.7 for s in range(20))

def test_views(monkeypatch):
    ims = [z.fit(blob(k)) for k in range(3)]
    rows = z.views(ims, [0, 0, 1], [5, 6, 7], 7)
    assert np.bincount([r[1] for r in rows]).tolist()==[7, 7] and {r[2] for r in rows if r[1]==0}=={5, 6}
    t = z.images('card_suit', [(r[0], r[1], r[2]) for r in rows+rows])
    assert len(t.x)==14 and t.x.shape[1:]==(32, 32, 3)
    assert all((a[0]==b[0]).all() for a, b in zip(rows, z.views(ims, [0, 0, 1], [5, 6, 7], 7)))
    for ground in (z.pastel, z.square, z.felt):
        c = np.stack([ground(np.random.default_rng(s)) for s in range(30)]); assert c.shape==(30, 3) and c.min()>=0 and c.max()<=255

def test_look_alike_pictures_and_decks_share_a_group():
    a, b = z.fit(blob(0)), z.fit(blob(1))
    assert z.alike_pictures([a, b, a], .97).tolist() in ([0, 1, 0], [1, 0, 1])
    assert len(set(z.deck_groups([[a, b], [b, a], [a, b]])))==2

def test_draw_svg():
    pytest.importorskip('resvg_py', reason='resvg-py is needed only to rebuild the pool')
    im = z.draw_svg('<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><rect width="2" height="4" fill="#f00"/></svg>', 8)
    a = np.asarray(im); assert im.size==(8, 8) and a[4, 1].tolist()==[255, 0, 0, 255] and a[4, 6, 3]==0

def test_cutout_leaves_out_drawings_sized_in_millimetres(tmp_path):
    pytest.importorskip('resvg_py', reason='resvg-py is needed only to rebuild the pool')
    for unit in ('', 'mm'): (tmp_path/f'a{unit}.svg').write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="40{unit}" height="40{unit}"><circle cx="20" cy="20" r="9"/></svg>')
    assert z.cutout(tmp_path/'a.svg').size[0]>12 and z.cutout(tmp_path/'amm.svg') is None

def test_radical():
    svg = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:kvg="http://kanjivg.tagaini.net"><g kvg:element="x"><g kvg:element="木" kvg:radical="{}"/></g></svg>'
    assert z.radical(svg.format('general'))=='木' and z.radical(svg.format('nelson')) is None
