"All that setup says stands in settings.ini; this file only hands it over."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(
    name=cfg['name'], version=cfg['version'], description=cfg['description'], author=cfg['author'], license=cfg['license'],
    keywords=cfg['keywords'], python_requires=f">={cfg['min_python']}",
    long_description=(here/'README.md').read_text(encoding='utf-8') if (here/'README.md').exists() else '',
    long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['name'], f"{cfg['name']}.*"]),
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    package_data={cfg['name']: ['zoo/*', 'zoo/*/*']},
    install_requires=cfg['requirements'].split(), extras_require={'dev': cfg['dev_requirements'].split(), 'pool': cfg['pool_requirements'].split()},
    classifiers=['Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    zip_safe=False,
)
