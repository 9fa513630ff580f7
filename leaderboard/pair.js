"use strict";

// The page of a pair. Its address says which rows: pair.html#a=ID&b=ID.
const groups = JSON.parse(document.getElementById("data").textContent);
const root = document.getElementById("pair");
const PAGE = 12; // cards that are added at a time
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function print(metric, value, signed = false) {
  if (value === null) return "–";
  const text = metric.percent ? `${(100 * value).toFixed(1)}%` : value.toFixed(3);
  return signed && value >= 0 ? `+${text}` : text;
}

// Scores of a row: [metric][subject][image], null where there is none.
function unpack(group, row) {
  if (row.scores) return row.scores;
  const bytes = Uint8Array.from(atob(row.values), (letter) => letter.charCodeAt(0));
  const whole = group.width === 2 ? new Uint16Array(bytes.buffer) : bytes;
  const none = 256 ** group.width - 1;
  let place = 0;
  row.scores = group.metrics.map((metric) => group.subjects.map(() => group.images.map(() => {
    const value = whole[place++];
    return value === none ? null : metric.low + value * metric.step;
  })));
  return row.scores;
}

// A minus B as told by leaderboard.statistics.compare; both orders of a pair are one comparison.
function comparison(group, a, b) {
  const [i, j] = a < b ? [a, b] : [b, a];
  const found = group.pairs[`${i} ${j}`];
  if (found === undefined || typeof found === "string" || i === a) return found;
  return Object.fromEntries(Object.entries(found).map(([key, [first, second, apart, low, high, p, q]]) =>
    [key, [second, first, -apart, -high, -low, p, q]]));
}

// Every image of every subject: both scores, the gain of A over B (positive: A is better), and the gain over all
// metrics, each in standard deviations of its differences.
function pairUp(group, a, b) {
  const first = unpack(group, group.rows[a]), second = unpack(group, group.rows[b]);
  const items = [];
  group.subjects.forEach((subject, s) => group.images.forEach((image, k) => {
    const scores = group.metrics.map((metric, m) => {
      const x = first[m][s][k], y = second[m][s][k];
      return {a: x, b: y, gain: x === null || y === null ? null : (metric.higher ? 1 : -1) * (x - y)};
    });
    if (scores.some((one) => one.gain !== null)) items.push({subject, image, order: items.length, scores});
  }));
  const spread = group.metrics.map((_, m) => {
    const gains = items.map((item) => item.scores[m].gain).filter((gain) => gain !== null);
    const mean = gains.reduce((x, y) => x + y, 0) / gains.length;
    return Math.sqrt(gains.reduce((x, y) => x + (y - mean) ** 2, 0) / gains.length);
  });
  const level = group.metrics.map((_, m) => {
    const values = items.flatMap((item) => [item.scores[m].a, item.scores[m].b]).filter((value) => value !== null);
    const mean = values.reduce((x, y) => x + y, 0) / values.length;
    return [mean, Math.sqrt(values.reduce((x, y) => x + (y - mean) ** 2, 0) / values.length)];
  });
  const average = (values) => {
    const known = values.filter((value) => value !== null && Number.isFinite(value));
    return known.length ? known.reduce((x, y) => x + y, 0) / known.length : 0;
  };
  for (const item of items) {
    item.gain = average(item.scores.map((one, m) => one.gain === null ? null : one.gain / (spread[m] || 1)));
    item.level = average(item.scores.map((one, m) => one.a === null || one.b === null ? null :
      (group.metrics[m].higher ? 1 : -1) * ((one.a + one.b) / 2 - level[m][0]) / (level[m][1] || 1)));
  }
  return items;
}

const ORDERS = {
  changed: "most changed first",
  best: "best for A first",
  worst: "worst for A first",
  high: "both score high first",
  low: "both score low first",
  test: "as in the test set",
};
let redraw = () => {};
const state = {order: "changed", metric: "all", subject: "all", shown: PAGE};

function chosen() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const a = asked.get("a"), b = asked.get("b");
  for (const [g, group] of groups.entries()) {
    const i = group.rows.findIndex((row) => row.id === a), j = group.rows.findIndex((row) => row.id === b);
    if (i >= 0 && j >= 0 && i !== j) return [g, i, j];
  }
  const g = groups.findIndex((group) => group.rows.length > 1);
  return g < 0 ? null : [g, 0, 1];
}

function go(g, a, b) {
  const rows = groups[g].rows;
  location.hash = `a=${rows[a].id}&b=${rows[b].id}`;
}

function select(label, options, value, onChange) {
  const box = element("select", {}, ...options.map(([key, text]) => element("option", {value: key}, text)));
  box.value = value;
  box.addEventListener("change", () => onChange(box.value));
  return element("label", {}, `${label} `, box);
}

function table(caption, columns, rows) {
  return element("div", {class: "scroll", role: "region", "aria-label": caption, tabindex: "0"},
    element("table", {class: "narrow"},
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, ...columns.map((text, k) => element("th", k ? {scope: "col"} : {scope: "col", class: "name"}, text)))),
      element("tbody", {}, ...rows.map(([first, ...rest]) =>
        element("tr", {}, element("th", {scope: "row", class: "name"}, ...first), ...rest.map((one) => element("td", {}, one)))))));
}

const named = (metric) => metric.note ? [`${metric.key} ${metric.arrow}`, element("small", {}, metric.note)] : [`${metric.key} ${metric.arrow}`];

function means(group, a, b) {
  const names = [group.rows[a].name, group.rows[b].name];
  const found = comparison(group, a, b);
  if (found === undefined || typeof found === "string") {
    const why = found ?? "there are too many pairs to test them all here";
    return [element("p", {class: "verdict"}, `No test of the means: ${why}. Type: python -m leaderboard compare ${group.rows[a].id} ${group.rows[b].id} --in FOLDER`)];
  }
  const wins = {a: 0, b: 0, none: 0};
  const rows = group.metrics.filter((metric) => found[metric.key]).map((metric) => {
    const [first, second, apart, low, high, p, q] = found[metric.key];
    const better = q >= 0.05 || apart === 0 ? "none" : (apart > 0) === metric.higher ? "a" : "b";
    wins[better]++;
    const told = {a: `A: ${names[0]}`, b: `B: ${names[1]}`, none: "cannot be told"}[better];
    return [named(metric), print(metric, first), print(metric, second), print(metric, apart, true),
      `${print(metric, low, true)} to ${print(metric, high, true)}`, Number(p.toPrecision(2)).toString(),
      Number(q.toPrecision(2)).toString(), told];
  });
  const metrics = (n) => `${n} metric${n === 1 ? "" : "s"}`;
  return [
    element("p", {class: "verdict"}, `A is better on ${metrics(wins.a)}, B on ${wins.b}; ${wins.none} cannot be told (q of at least .05).`),
    table("A minus B, paired over images: crossed bootstrap interval, permutation p, q after Benjamini-Hochberg over metrics.",
      ["metric", "A", "B", "A − B", "95 %", "p", "q", "better"], rows),
  ];
}

function gainOf(item) {
  return state.metric === "all" ? item.gain : item.scores[state.metric].gain;
}

function levelOf(group, item) {
  if (state.metric === "all") return item.level;
  const {a, b} = item.scores[state.metric];
  return a === null || b === null ? null : (group.metrics[state.metric].higher ? 1 : -1) * (a + b) / 2;
}

// Highest first by what the order asks; those without a value last.
function ordered(group, items) {
  const key = {
    changed: (item) => gainOf(item) === null ? null : Math.abs(gainOf(item)),
    best: gainOf,
    worst: (item) => gainOf(item) === null ? null : -gainOf(item),
    high: (item) => levelOf(group, item),
    low: (item) => levelOf(group, item) === null ? null : -levelOf(group, item),
    test: (item) => -item.order,
  }[state.order];
  return [...items].sort((x, y) => {
    const p = key(x), q = key(y);
    if (p === null || q === null) return (p === null) - (q === null);
    return q - p || x.order - y.order;
  });
}

function signed(group, gain) {
  if (gain === null) return "no value";
  if (state.metric === "all") return `${gain >= 0 ? "+" : "−"}${Math.abs(gain).toFixed(2)} SD`;
  const metric = group.metrics[state.metric];
  return print(metric, gain, true);
}

function chart(group, items) {
  const gains = items.map(gainOf).filter((gain) => gain !== null).sort((x, y) => y - x);
  if (!gains.length) return element("p", {}, "No image has this score in both rows.");
  const width = Math.max(300, Math.min(1200, root.clientWidth)), height = 190, left = 66, top = 12, bottom = 12;
  const most = Math.max(...gains.map(Math.abs)) || 1;
  const wide = (width - left) / gains.length;
  const y = (gain) => top + (1 - gain / most) / 2 * (height - top - bottom);
  const ahead = gains.filter((gain) => gain > 0).length, behind = gains.filter((gain) => gain < 0).length;
  const label = `Gain of A over B on ${gains.length} images: A better on ${ahead}, B better on ${behind}, from ${signed(group, gains.at(-1))} to ${signed(group, gains[0])}`;
  const svg = shape("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label});
  gains.forEach((gain, k) => svg.append(shape("rect", {
    class: gain >= 0 ? "side-a" : "side-b", x: (left + k * wide).toFixed(2), width: Math.max(0.4, wide - (wide > 4 ? 1 : 0)).toFixed(2),
    y: Math.min(y(0), y(gain)).toFixed(1), height: Math.max(0.5, Math.abs(y(gain) - y(0))).toFixed(1),
  })));
  svg.append(shape("path", {class: "zero", d: `M${left} ${y(0)}H${width}`}));
  for (const level of [most, 0, -most]) {
    svg.append(shape("text", {x: left - 6, y: y(level) + 4, "text-anchor": "end"}, level ? signed(group, level) : "0"));
  }
  svg.append(shape("text", {class: "side", x: width - 4, y: top + 12, "text-anchor": "end"}, `↑ A better on ${ahead}`));
  svg.append(shape("text", {class: "side", x: left + 4, y: height - bottom - 4}, `↓ B better on ${behind}`));
  return svg;
}

function picture(row, item, seen, label) {
  const place = row.pictures?.places[item.subject]?.[item.image];
  if (!place) return element("p", {class: "no-picture"}, "no picture here");
  const [seenSheet, madeSheet, at, rows] = place;
  const shown = element("i", {role: "img", "aria-label": label});
  shown.style.backgroundImage = `url("images/${row.pictures.sheets[seen ? seenSheet : madeSheet]}")`;
  shown.style.backgroundSize = `${seen ? 100 : 300}% ${100 * rows}%`;
  shown.style.backgroundPosition = `${seen ? 0 : 50 * row.pictures.column}% ${rows > 1 ? 100 * at / (rows - 1) : 0}%`;
  return shown;
}

function card(group, a, b, item, number) {
  const [first, second] = [group.rows[a], group.rows[b]];
  const title = `image ${item.image}, subject ${item.subject}`;
  const gain = gainOf(item);
  const side = gain === null || gain === 0 ? "" : gain > 0 ? "A better" : "B better";
  const figure = (mark, name, shown) => element("figure", {class: mark ? `side-${mark.toLowerCase()}` : ""}, shown,
    element("figcaption", {}, ...(mark ? [element("b", {}, mark), ` ${name}`] : [name])));
  const withSeen = first.pictures?.places[item.subject]?.[item.image] ? first : second;
  const detail = element("details", {}, element("summary", {}, "all metrics"));
  detail.addEventListener("toggle", () => {
    if (detail.children.length > 1) return;
    detail.append(table(title, ["metric", "A", "B", "A − B"], group.metrics.map((metric, m) => {
      const one = item.scores[m];
      const apart = one.gain === null ? "–" : print(metric, one.a - one.b, true);
      return [named(metric), print(metric, one.a), print(metric, one.b), apart];
    })));
  });
  const told = [];
  if (state.metric !== "all") {
    const metric = group.metrics[state.metric], one = item.scores[state.metric];
    told.push(`${metric.key}: A ${print(metric, one.a)}, B ${print(metric, one.b)}`);
  } else {
    const ahead = item.scores.filter((one) => one.gain > 0).length, behind = item.scores.filter((one) => one.gain < 0).length;
    told.push(`A better on ${ahead} metrics, B on ${behind}`);
  }
  return element("li", {class: "card", "aria-label": `${number}: ${title}`},
    element("h3", {}, title, " ", element("small", {}, side ? `${side}, ${signed(group, gain)}` : signed(group, gain))),
    element("div", {class: "three"},
      figure("", "seen", picture(withSeen, item, true, `${title}, seen`)),
      figure("A", first.name, picture(first, item, false, `${title}, A`)),
      figure("B", second.name, picture(second, item, false, `${title}, B`))),
    element("p", {class: "soft"}, told.join("; ")), detail);
}

function images(group, a, b) {
  const items = pairUp(group, a, b);
  const list = element("ol", {class: "cards"});
  const status = element("p", {class: "soft", role: "status"});
  const more = element("button", {type: "button"}, "Show more images");
  const plot = element("div", {class: "plot"});
  let own = [];
  const fill = () => {
    const from = list.children.length, to = Math.min(state.shown, own.length);
    list.append(...own.slice(from, to).map((item, k) => card(group, a, b, item, from + k + 1)));
    more.hidden = to >= own.length;
    status.textContent = `${to} of ${own.length} images, ${ORDERS[state.order]}`;
    return list.children[from];
  };
  const draw = () => {
    own = ordered(group, items.filter((item) => state.subject === "all" || String(item.subject) === state.subject));
    state.shown = PAGE;
    list.replaceChildren();
    plot.replaceChildren(chart(group, own));
    fill();
  };
  more.addEventListener("click", () => {
    state.shown += 2 * PAGE;
    const first = fill();
    first.tabIndex = -1;
    first.focus();
  });
  const set = (name) => (value) => { state[name] = value; draw(); };
  if (state.metric !== "all" && !group.metrics[state.metric]) state.metric = "all";
  if (state.subject !== "all" && !group.subjects.includes(Number(state.subject))) state.subject = "all";
  const controls = element("div", {class: "choose"},
    select("order", Object.entries(ORDERS), state.order, set("order")),
    select("by", [["all", "all metrics"], ...group.metrics.map((metric, m) => [String(m), `${metric.key} ${metric.arrow}`])], state.metric, set("metric")),
    select("subject", [["all", "all"], ...group.subjects.map((subject) => [String(subject), String(subject)])], state.subject, set("subject")));
  const limits = [];
  if (group.images.length < group.all) limits.push(`The page holds ${group.images.length} of ${group.all} test images, those on which the rows differ most; the table above is of all.`);
  if (group.width === 1) limits.push("Scores of single images are rounded to 1 in 254 of their range.");
  redraw = () => plot.replaceChildren(chart(group, own));
  draw();
  return [
    element("h2", {id: "images"}, "Image by image"),
    element("p", {class: "soft"}, "A bar an image, the gain of A over B: up where A is better, down where B is. Over all metrics: mean of the gains, each in standard deviations of its differences (SD). ", ...limits),
    controls, plot, status, list, more,
  ];
}

function render() {
  const pair = chosen();
  if (!pair) {
    root.replaceChildren(element("p", {}, "No two rows of one leaderboard have scores of single images here. They are kept where a sweep makes them, or by: python -m leaderboard add scores.json --per-image scores.parquet"));
    return;
  }
  const [g, a, b] = pair;
  const group = groups[g], names = group.rows.map((row) => row.name);
  document.title = `${names[a]} – ${names[b]}`;
  document.querySelector("h1").replaceChildren(
    element("span", {class: "side-a"}, element("b", {}, "A"), ` ${names[a]}`), " against ",
    element("span", {class: "side-b"}, element("b", {}, "B"), ` ${names[b]}`));
  const rows = names.map((name, k) => [String(k), name]);
  const swap = element("button", {type: "button"}, "Swap A and B");
  swap.addEventListener("click", () => go(g, b, a));
  const other = (value, kept) => value !== kept ? kept : value === a ? b : a; // a row against itself says nothing
  const choose = element("div", {class: "choose"},
    ...(groups.length > 1 ? [select("leaderboard", groups.map((one, k) => [String(k), `${one.title} (${one.track})`]), String(g), (value) => go(Number(value), 0, 1))] : []),
    select("A", rows, String(a), (value) => go(g, Number(value), other(Number(value), b))),
    select("B", rows, String(b), (value) => go(g, other(Number(value), a), Number(value))), swap);
  const links = element("p", {},
    "Runs: ", element("a", {href: `run-${group.rows[a].id}.html`}, names[a]), ", ", element("a", {href: `run-${group.rows[b].id}.html`}, names[b]),
    `; ${group.track} track, protocol ${group.protocol}`);
  root.replaceChildren(choose, links, ...means(group, a, b), ...images(group, a, b));
}

addEventListener("hashchange", () => {
  const label = document.activeElement?.closest("label")?.firstChild.textContent ?? document.activeElement?.textContent;
  render();
  // What was operated stands in the new page too: the keyboard stays there.
  const same = [...root.querySelectorAll(".choose label, .choose button")].find((one) => one.firstChild.textContent === label);
  (same?.querySelector("select") ?? same ?? document.querySelector("h1")).focus();
});
addEventListener("resize", () => redraw());
render();
