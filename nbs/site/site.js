// Search, the menu of narrow windows, and the mark at the section being read. Nothing is fetched: files come as scripts, which also works from a disk.
(() => {
  const $ = s => document.querySelector(s), query = $('#site-query'), panel = $('#site-results'), found = $('#site-found'), list = $('#site-results ul')

  // --- search: library and texts are loaded when the field is first used
  let loading, docs, index
  const script = src => new Promise((done, failed) => document.head.append(Object.assign(document.createElement('script'), {src, onload: done, onerror: failed})))
  const ready = () => loading ??= script('minisearch.js').then(() => script('search-data.js')).then(() => {
    docs = window.searchData.map(([href, page, title, text], id) => ({id, href, page, title, text}))
    index = new MiniSearch({fields: ['title', 'page', 'text'], searchOptions: {boost: {title: 4, page: 2}, prefix: true, fuzzy: t => t.length>4 ? .2 : 0}})
    index.addAll(docs)
  })

  function snippet(text, terms) { // what stands around the first term, with every term marked
    const word = new RegExp(`(${terms.map(t => t.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')).join('|')})`, 'giu')
    const at = Math.max(0, text.search(word)-60), piece = (at ? '…' : '')+text.slice(at, at+170)+(text.length>at+170 ? '…' : '')
    const line = document.createElement('small')
    piece.split(word).forEach((s, i) => line.append(i%2 ? Object.assign(document.createElement('mark'), {textContent: s}) : s))
    return line
  }

  async function search() {
    const text = query.value.trim()
    if (text.length<2) { panel.hidden = true; return }
    await ready()
    if (text!==query.value.trim()) return // typed on meanwhile
    let hits = index.search(text, {combineWith: 'AND'})
    if (!hits.length) hits = index.search(text)
    found.textContent = hits.length ? `${hits.length} ${hits.length==1 ? 'section' : 'sections'}` : 'Nothing found'
    list.replaceChildren(...hits.slice(0, 20).map(hit => {
      const d = docs[hit.id], item = document.createElement('li'), link = Object.assign(document.createElement('a'), {href: d.href})
      const title = Object.assign(document.createElement('b'), {textContent: d.title}), page = Object.assign(document.createElement('span'), {textContent: d.page==d.title ? '' : d.page})
      link.append(title, page, snippet(d.text, hit.terms))
      item.append(link)
      return item
    }))
    panel.hidden = false
  }

  const links = () => [...list.querySelectorAll('a')]
  const close = () => { panel.hidden = true }
  query.addEventListener('focus', () => { ready().then(search) })
  query.addEventListener('input', search)
  $('#site-search').addEventListener('keydown', e => {
    const all = links(), at = all.indexOf(document.activeElement)
    if (e.key=='Escape') { close(); query.focus(); panel.hidden = true }
    if (e.key=='ArrowDown' && all.length) { e.preventDefault(); all[Math.min(at+1, all.length-1)].focus() }
    if (e.key=='ArrowUp' && at>=0) { e.preventDefault(); at ? all[at-1].focus() : query.focus() }
    if (e.key=='Enter' && e.target==query && all.length) all[0].click()
  })
  list.addEventListener('click', close)
  document.addEventListener('click', e => { if (!$('#site-search').contains(e.target)) close() })
  $('#site-search').addEventListener('focusout', e => { if (e.relatedTarget && !$('#site-search').contains(e.relatedTarget)) close() })
  document.addEventListener('keydown', e => {
    if (e.key!='/' || e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName)) return
    e.preventDefault(); query.focus(); query.select()
  })

  // --- the menu
  const menu = $('#site-menu'), sidebar = $('#site-sidebar')
  const open = yes => { document.body.classList.toggle('menu', yes); menu.setAttribute('aria-expanded', yes) }
  menu.addEventListener('click', () => open(!document.body.classList.contains('menu')))
  document.addEventListener('keydown', e => { if (e.key=='Escape' && document.body.classList.contains('menu')) { open(false); menu.focus() } })
  const current = sidebar.querySelector('[aria-current]')
  if (current) sidebar.scrollTop = current.offsetTop-sidebar.clientHeight/2

  // --- wide code, tables and formulas can be scrolled by keyboard
  for (const e of document.querySelectorAll('.highlight, .output_area, .scroll, .signature, math[display=block]'))
    if (e.scrollWidth>e.clientWidth+1 && !e.closest('[tabindex="0"]')) { e.tabIndex = 0; e.setAttribute('role', 'group'); e.setAttribute('aria-label', 'Scrolls sideways') }

  // --- the section being read
  const marks = new Map([...document.querySelectorAll('#site-toc a')].map(a => [document.getElementById(decodeURIComponent(a.hash.slice(1))), a]))
  const heads = [...marks.keys()].filter(Boolean)
  const follow = () => {
    const at = heads.filter(h => h.getBoundingClientRect().top<120).pop()
    marks.forEach((a, h) => h===at ? a.setAttribute('aria-current', 'location') : a.removeAttribute('aria-current'))
  }
  if (heads.length) { document.addEventListener('scroll', follow, {passive: true}); follow() }
})()
