// What is wrong with how a page is built or looks, as sentences. Run in the page; a small part of what axe-core asks.
function lookAtPage() {
  const wrong = [];
  const told = (one) => `<${one.tagName.toLowerCase()}${one.id ? ` id=${one.id}` : ""} class="${one.getAttribute("class") ?? ""}"> ${(one.textContent ?? "").trim().slice(0, 40)}`;
  const seen = (one) => one.checkVisibility({visibilityProperty: true, opacityProperty: true});
  if (!document.documentElement.lang) wrong.push("no language");
  if (!document.title) wrong.push("no title");
  if ([...document.querySelectorAll("h1")].filter(seen).length !== 1) wrong.push("not one h1");
  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5")) {
    if (!seen(heading)) continue;
    const own = Number(heading.tagName[1]);
    if (own > level + 1) wrong.push(`heading skips a level: ${told(heading)}`);
    level = own;
  }
  const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  for (const id of new Set(ids)) if (ids.filter((other) => other === id).length > 1) wrong.push(`id twice: ${id}`);
  for (const one of document.querySelectorAll("input, select, textarea")) {
    if (!one.labels?.length && !one.getAttribute("aria-label")) wrong.push(`no label: ${told(one)}`);
  }
  for (const one of document.querySelectorAll("a, button, summary")) {
    if (seen(one) && !(one.textContent.trim() || one.getAttribute("aria-label"))) wrong.push(`no name: ${told(one)}`);
  }
  for (const one of document.querySelectorAll("img, [role=img]")) {
    if (!(one.alt || one.getAttribute("aria-label"))) wrong.push(`no text for an image: ${told(one)}`);
  }
  for (const table of document.querySelectorAll("table")) {
    if (!table.caption?.textContent.trim()) wrong.push(`no caption: ${told(table)}`);
    for (const cell of table.querySelectorAll("th")) if (!cell.scope) wrong.push(`no scope: ${told(cell)}`);
  }
  for (const box of document.querySelectorAll("*")) {
    if (seen(box) && box.scrollWidth > box.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(box).overflowX) && box.tabIndex < 0) wrong.push(`scrolls by mouse only: ${told(box)}`);
  }
  if (document.documentElement.scrollWidth > innerWidth) {
    const wide = [...document.querySelectorAll("main *")].filter((one) => seen(one) && !one.closest(".scroll") && one.getBoundingClientRect().right > innerWidth + 1);
    wrong.push(`wider than the window by ${document.documentElement.scrollWidth - innerWidth} px: ${wide.slice(0, 3).map(told).join(" | ")}`);
  }
  for (const one of document.querySelectorAll("button, select, input, a.button")) {
    const box = one.getBoundingClientRect();
    if (seen(one) && !one.closest("thead") && Math.min(box.width, box.height) < 15.9) wrong.push(`too small for a finger: ${told(one)}`);
  }
  return wrong;
}

// Texts whose contrast with what is behind them is below WCAG's 4.5 (3 where large).
function lookAtContrast() {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const cache = new Map();
  const rgba = (text) => {
    if (!cache.has(text)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = text;
      canvas.fillRect(0, 0, 1, 1);
      cache.set(text, [...canvas.getImageData(0, 0, 1, 1).data]);
    }
    return cache.get(text);
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((part) => part / 255).map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const behind = (one) => {
    for (let box = one; box; box = box.parentElement) {
      const colour = rgba(getComputedStyle(box).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const wrong = new Map();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walk.nextNode(); text; text = walk.nextNode()) {
    const one = text.parentElement;
    if (!text.data.trim() || !one.checkVisibility({visibilityProperty: true}) || one.closest(".unseen, script, noscript, title, option")) continue;
    const style = getComputedStyle(one);
    const onDot = one.classList.contains("number");
    const front = rgba(one instanceof SVGElement ? style.fill : style.color);
    const back = onDot ? rgba(getComputedStyle(document.querySelector("circle.dot")).fill) : behind(one);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const found = ratio(front, back);
    if (found < (large ? 3 : 4.5)) wrong.set(`${one.tagName} ${one.className?.baseVal ?? one.className} on ${one.parentElement.tagName}`, `${found.toFixed(2)}: ${text.data.trim().slice(0, 30)}`);
  }
  return [...wrong].map(([where, what]) => `${where}: ${what}`);
}
