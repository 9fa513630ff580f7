"use strict";

const data = JSON.parse(document.querySelector("#data").textContent);
const field = document.querySelector("#tokens");
const detail = document.querySelector("#detail");
const choice = document.querySelector("#grid");
const order = document.querySelector("#order");
const dark = matchMedia("(prefers-color-scheme: dark)");
let chosen = null; // the token that was tapped: it stays when the pointer leaves
let shown = null;

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const words = (text) => new Uint16Array(bytes(text).buffer);
for (const grid of data.grids) grid.values = bytes(grid.values);
data.light.values = bytes(data.light.values);
for (const view of Object.values(data.cortex?.views ?? {})) {
  view.points = words(view.points);
  view.labels = words(view.labels);
}
const pictures = data.images.map((source) => {
  const picture = new Image();
  picture.src = source;
  return picture;
});

const grid = () => data.grids[choice.value];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A map: dark where the token is read least, bright where most.
function drawMap(canvas, side, values, start) {
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  const image = context.createImageData(side, side);
  for (let k = 0; k < side * side; k++) image.data.fill(values[start + k], 4 * k, 4 * k + 3)[4 * k + 3] = 255;
  context.putImageData(image, 0, 0);
}

function drawToken(canvas, token) {
  const {side, values} = grid();
  drawMap(canvas, side, values, token * side * side);
}

function drawCortex(canvas, view, token) {
  const size = canvas.width = canvas.height = 300;
  const context = canvas.getContext("2d");
  const {points, labels} = view;
  const radius = Math.max(1.2, 60 / Math.sqrt(labels.length));
  const quiet = dark.matches ? "#3a3f48" : "#d3d6da";
  const accent = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  for (const own of [false, true]) {
    context.fillStyle = own ? accent : quiet;
    for (let k = 0; k < labels.length; k++) {
      if ((labels[k] === token) !== own) continue;
      context.beginPath();
      context.arc(points[2 * k] / 65535 * size, points[2 * k + 1] / 65535 * size, own ? radius * 1.5 : radius, 0, 7);
      context.fill();
    }
  }
}

// An image, dark where the token attends no more than it always does.
function drawLit(canvas, image, token, place) {
  const side = data.light.side, size = 96;
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const draw = () => {
    context.drawImage(pictures[image], 0, 0, size, size);
    const mask = document.createElement("canvas");
    mask.width = mask.height = side;
    const shade = mask.getContext("2d").createImageData(side, side);
    const start = (token * data.tokens[token].top.length + place) * side * side;
    for (let k = 0; k < side * side; k++) shade.data[4 * k + 3] = 0.75 * (255 - data.light.values[start + k]);
    mask.getContext("2d").putImageData(shade, 0, 0);
    context.imageSmoothingEnabled = true;
    context.drawImage(mask, 0, 0, size, size);
  };
  if (pictures[image].complete) draw(); else pictures[image].addEventListener("load", draw);
}

function sideOf(right) {
  if (right === null) return "";
  return right > 0.5 ? `${Math.round(100 * right)} % of them right` : `${Math.round(100 * (1 - right))} % of them left`;
}

function show(token) {
  shown = token;
  for (const button of field.children) button.setAttribute("aria-pressed", String(Number(button.dataset.token) === token));
  const own = data.tokens[token], {colours, share} = grid();
  const all = own.voxels.reduce((a, b) => a + b, 0);
  detail.style.setProperty("--mine", colours[token]);
  const map = element("canvas", {class: "map", role: "img", "aria-label": `map of token ${token}`});
  drawToken(map, token);
  const row = element("div", {class: "pair"}, element("figure", {}, map,
    element("figcaption", {}, `attention, ${(100 * share[token][0]).toPrecision(2)} to ${(100 * share[token][1]).toPrecision(2)} %`)));
  for (const [name, view] of Object.entries(data.cortex?.views ?? {})) {
    const canvas = element("canvas", {role: "img", "aria-label": `voxels of token ${token}, ${name}`});
    drawCortex(canvas, view, token);
    row.append(element("figure", {}, canvas, element("figcaption", {}, `subject ${data.cortex.subject}, ${name}`)));
  }
  const head = element("tr", {}, ...["subject", ...data.subjects].map((text) => element("th", {scope: "col"}, String(text))));
  const counts = element("tr", {}, element("th", {scope: "row"}, "voxels"), ...own.voxels.map((n) => element("td", {}, String(n))));
  const tops = element("div", {class: "top"});
  own.top.forEach((image, place) => {
    const canvas = element("canvas", {role: "img", "aria-label": data.names[image], title: data.names[image]});
    drawLit(canvas, image, token, place);
    tops.append(element("figure", {}, canvas));
  });
  const side = sideOf(own.right);
  const close = element("button", {type: "button"}, "close");
  close.addEventListener("click", rest);
  detail.replaceChildren(
    close,
    element("h2", {}, `Token ${token}`),
    element("p", {}, `Cluster ${token}: ${all} voxels${side && all ? `, ${side}` : ""}.`),
    row,
    element("table", {}, element("thead", {}, head), element("tbody", {}, counts)),
    element("h3", {}, `Images in which it stands out (likeness of contents: z = ${own.likeness})`),
    tops,
  );
}

const hint = detail.firstElementChild;
function rest() {
  chosen = shown = null;
  for (const button of field.children) button.setAttribute("aria-pressed", "false");
  detail.replaceChildren(hint);
}

function lay() {
  const {columns, places, colours} = grid();
  const tokens = data.tokens.map((_, token) => token);
  const byPlace = order.value === "place";
  if (byPlace) tokens.sort((a, b) => places[a][1] - places[b][1] || places[a][0] - places[b][0]);
  else tokens.sort((a, b) => data.tokens[b].likeness - data.tokens[a].likeness);
  field.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  field.replaceChildren(...tokens.map((token) => {
    const canvas = element("canvas");
    drawToken(canvas, token);
    const all = data.tokens[token].voxels.reduce((a, b) => a + b, 0);
    const button = element("button", {
      type: "button", "data-token": token, "aria-pressed": String(token === shown), "aria-label": `token ${token}, ${all} voxels`,
    }, canvas);
    button.style.setProperty("--mine", colours[token]);
    if (byPlace) [button.style.gridColumn, button.style.gridRow] = [places[token][0] + 1, places[token][1] + 1];
    button.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") show(token); });
    button.addEventListener("focus", () => show(token));
    button.addEventListener("click", () => { chosen = token; show(token); });
    return button;
  }));
}

field.addEventListener("pointerleave", () => { if (chosen !== null) show(chosen); });
function redraw() {
  lay();
  if (shown !== null) show(shown);
}
choice.value = choice.dataset.start;
choice.addEventListener("change", redraw);
order.addEventListener("change", redraw);
dark.addEventListener("change", redraw);
lay();
if (matchMedia("(min-width: 52rem)").matches) show(Number(field.firstElementChild.dataset.token));
