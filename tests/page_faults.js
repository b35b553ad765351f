// What is wrong with the page on show, as lines "kind: what". Called with the width of the window
// in CSS pixels and the smallest scale, shown size by natural size, at which a figure of the book
// can be read. Looks at the light and at the dark form of the page.
const [width, figureScale] = arguments;
const faults = [], root = document.documentElement;
const say = (kind, text) => faults.push(`${kind}: ${text}`);
const name = e => e.tagName.toLowerCase() + (e.className && e.className.baseVal === undefined
  ? "." + e.className.trim().replace(/\s+/g, ".") : "");
const seen = e => e.checkVisibility({ opacityProperty: true, visibilityProperty: true });
const scrolls = e => e && e !== root && e !== document.body
  && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));

// Colours as they end up, not on their way from one theme to the other, or to being unfolded.
if (!document.getElementById("still"))
  document.head.insertAdjacentHTML("beforeend",
    '<style id="still">*, ::before, ::after { transition: none !important; animation: none !important }</style>');
// What is folded away is a part of the page too.
for (const folded of document.querySelectorAll("article details")) folded.open = true;

for (const img of document.images) {
  const alt = img.getAttribute("alt");
  if (!img.naturalWidth) say("image", `does not load: ${img.src}`);
  if (img.ariaHidden === "true" || img.role === "presentation") continue;
  if (!alt || /\.(png|svg|jpe?g)$|_images\//.test(alt)) say("alt", `none: ${img.src}`);
}
for (const img of document.querySelectorAll(".cell_output img"))
  if (img.naturalWidth && img.width < Math.min(figureScale, 1) * img.naturalWidth - 1)
    say("legible", `figure of ${img.naturalWidth} px shown at ${img.width} px: ${img.src}`);
for (const img of document.querySelectorAll("article figure > img"))  // drawings, 12 px type at 560
  if (img.naturalWidth && img.width < 560) say("legible", `${img.width} px wide: ${img.src}`);
for (const formula of document.querySelectorAll("article .math"))
  if (!formula.querySelector("mjx-container")) say("math", `not typeset: ${formula.textContent}`);
for (const error of document.querySelectorAll("mjx-merror")) say("math", error.textContent);
for (const { name: url } of performance.getEntriesByType("resource"))
  if (/^https?:/.test(url) && new URL(url).origin !== location.origin) say("network", url);

// Colours: [r, g, b, a]; `over` lays one with transparency on another.
const colour = text => {
  const v = text.match(/[\d.]+/g).map(Number);
  return text.startsWith("color(") ? [v[0] * 255, v[1] * 255, v[2] * 255, v[3] ?? 1]
    : [v[0], v[1], v[2], v[3] ?? 1];
};
const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
const luminance = c => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => {
  const v = c[i] / 255;
  return sum + share * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
}, 0);
const ratio = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};

for (const theme of ["light", "dark"]) {
  root.dataset.theme = root.dataset.mode = theme;
  const reach = Math.max(root.scrollWidth, document.body.scrollWidth);
  if (reach > width) {
    const wide = [...document.querySelectorAll("main *")]
      .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e)).slice(0, 3);
    say("overflow", `${theme}: ${reach} px wide on ${width} px (${wide.map(name).join(", ")})`);
  }
  // Nothing reaches out of the column of text, unless it scrolls in a box of its own.
  const article = document.querySelector("article");
  const edge = article ? article.getBoundingClientRect().right + 1 : Infinity;
  for (const e of document.querySelectorAll("article :is(pre, code, table, img, mjx-container)"))
    if (seen(e) && e.getBoundingClientRect().right > edge && !scrolls(e.parentElement))
      say("spills", `${theme}: ${name(e)} (${e.textContent.trim().slice(0, 40)})`);
  for (const pre of document.querySelectorAll("article pre"))
    if (pre.scrollWidth > pre.clientWidth + 1 && !scrolls(pre))
      say("code", `${theme}: wider than its box: ${pre.textContent.trim().slice(0, 60)}`);

  // Ground under an element: its own and its ancestors' colours; null where a picture is in it.
  const grounds = new Map();
  const ground = e => {
    if (!e) return [255, 255, 255, 1];
    if (!grounds.has(e)) {
      const style = getComputedStyle(e), own = colour(style.backgroundColor);
      const below = own[3] === 1 ? own : ground(e.parentElement);
      const picture = style.backgroundImage !== "none" && !style.backgroundImage.includes("url(\"data");
      grounds.set(e, picture || !below ? null : over(own, below));
    }
    return grounds.get(e);
  };
  const opacities = new Map();
  const opacity = e => {
    if (!e) return 1;
    if (!opacities.has(e)) opacities.set(e, +getComputedStyle(e).opacity * opacity(e.parentElement));
    return opacities.get(e);
  };
  // Siblings of one class look alike: of the thousand tokens of a listing a dozen are looked at.
  const poor = new Map(), done = new Map();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const look = e => {
    const alike = done.get(e.parentElement) ?? new Set(), kind = e.tagName + "." + e.className + e.style.cssText;
    if (alike.has(kind)) return;
    done.set(e.parentElement, alike.add(kind));
    if (!seen(e) || e.closest("script, style, noscript, select, [disabled], mjx-assistive-mml"))
      return;
    const under = ground(e);
    if (!under) return;
    const style = getComputedStyle(e), ink = colour(style.color);
    ink[3] *= opacity(e);
    const size = parseFloat(style.fontSize), bold = +style.fontWeight >= 700;
    const needed = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
    const found = ratio(over(ink, under), under);
    if (found < needed - 0.005) {
      const key = `${style.color} on rgb(${under.slice(0, 3).map(Math.round)})`;
      if (!poor.has(key)) poor.set(key, [found, e, 0]);
      poor.get(key)[2] += 1;
    }
  };
  while (walker.nextNode())
    if (walker.currentNode.textContent.trim()) look(walker.currentNode.parentElement);
  document.querySelectorAll("mjx-container").forEach(look);
  for (const [key, [found, e, count]] of poor)
    say("contrast", `${theme}: ${found.toFixed(2)}, ${key}, ${count} times, first in ` +
      `${name(e)} (${e.textContent.trim().slice(0, 30)})`);
}
return faults;
