"use strict";

const $ = id => document.getElementById(id);
const VERDICTS = { agrees: "✓ agrees", disagrees: "✗ disagrees", unsure: "? unsure" };
const ADVICE = { agrees: () => " with the record", disagrees: () => " with the record: recount", unsure: said => `: ${said.reason}` };

const items = [];                   // one object for each photo
let shown = null, running = 0;      // the photo in the large card; requests on their way
let order = null, down = false;     // the column by which the table is sorted, and whether from large to small
let token = sessionStorage.getItem("binvision-token") || "";

// Small helpers

function make(tag, set = {}, ...children) {
  const e = Object.assign(document.createElement(tag), set);
  e.append(...children);
  return e;
}
const percent = p => p > 0 && p < .005 ? "<1 %" : `${Math.round(100 * p)} %`;
const things = n => `${n} item${n === 1 ? "" : "s"}`;
const range = ({ plausible: r }) => !r ? "" : r.low < r.high ? ` · ${r.low} to ${r.high} plausible` : ` · only ${r.low} plausible`;
const say = text => { $("status").textContent = text; };
const headers = () => token ? { Authorization: `Bearer ${token}` } : {};
const seen = text => text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu,  // control characters and marks
  c => c.split("").map(unit => "\\u" + unit.charCodeAt(0).toString(16).padStart(4, "0")).join(""));
const wait = seconds => new Promise(done => setTimeout(done, 1000 * seconds));

// Photos come in and are asked about, four at a time

function add(files) {
  const fresh = [...files].map(file => ({
    file, name: seen(file.name || "photo.jpg"), url: URL.createObjectURL(file),
    quantity: "", state: "waiting", answer: null, error: "",
  }));
  if (!fresh.length) return;
  for (const item of fresh) { row(item); items.push(item); }
  if (!shown || fresh.length === 1 || items.length === fresh.length) shown = fresh[0];
  document.body.classList.add("has");
  draw();
  fill();
}

function fill() {
  while (running < 4) {
    const item = items.find(i => i.state === "waiting");
    if (!item) return;
    running++;
    ask(item).finally(() => { running--; fill(); });
  }
}

async function ask(item) {
  const asked = item.quantity;
  item.state = "sent";
  draw(item);
  try {
    for (let tries = 0; ; tries++) {
      const form = new FormData();
      form.append("image", item.file, item.name);
      if (asked !== "") form.append("quantity", asked);
      const reply = await fetch("predict", { method: "POST", body: form, headers: headers() });
      if (reply.status === 503 && tries < 20) {
        await wait(Number(reply.headers.get("Retry-After")) || 1);
        continue;
      }
      const body = await reply.json();
      if (reply.status === 401) return hold(item);
      if (!reply.ok) throw new Error(body.detail);
      item.answer = body.predictions[0];
      item.error = "";
      break;
    }
  } catch (e) {
    item.answer = null;
    const unreachable = e instanceof TypeError;
    item.error = unreachable ? "the service cannot be reached: try again" : e.message.replace(`${item.name}: `, "");
  }
  item.state = item.quantity === asked ? "done" : "waiting";
  tell(item);
  draw(item);
}

function tell(item) {
  const a = item.answer, said = a?.agreement;
  if (!a) return say(`${item.name}: ${item.error}`);
  const record = said ? ` The picture ${said.verdict === "unsure" ? "is " : ""}${said.verdict}${ADVICE[said.verdict](said)}` : "";
  say(`${item.name}: ${things(a.count)}, ${a.certainty}.${record}`);
}

function hold(item) {
  item.state = "held";
  item.error = "waiting for the access token";
  draw(item);
  $("access").hidden = false;
  $("token").focus();
  say("The service asks for an access token.");
}

function record(item, value) {
  value = value.trim();
  if (value === item.quantity) return;
  item.quantity = value;
  if (item.state === "done") { item.state = "waiting"; fill(); }
}

// The table: a row for each photo
function show(item) {
  shown = item;
  draw();
  $("detail").scrollIntoView({ block: "nearest" });
  tell(item);
}

function row(item) {
  const cell = name => make("td", { className: name, role: "cell" }), c = item.cells = {};
  for (const name of ["shot", "name", "count", "sure", "chances", "quantity", "agrees"]) c[name] = cell(name);
  c.shot.append(make("img", { src: item.url, alt: "" }));
  c.name.append(make("button", { type: "button", textContent: item.name, onclick: () => show(item) }));
  item.input = make("input", {
    className: "number", inputMode: "numeric", maxLength: 6, ariaLabel: `Recorded quantity of ${item.name}`,
    onchange: e => record(item, e.target.value),
  });
  c.quantity.append(item.input);
  item.row = make("tr", { role: "row" }, ...Object.values(c));
}

function badge(item, advice = false) {
  if (item.error) return make("span", { className: "badge error", textContent: item.error });
  const said = item.answer?.agreement;
  if (!said) return "";
  const { verdict } = said, textContent = VERDICTS[verdict] + (advice ? ADVICE[verdict](said) : "");
  return make("span", { className: `badge ${verdict}`, textContent });
}

function bar(tag, p, top) {
  const e = make(tag, { className: top ? "top" : "" });
  e.style.setProperty("--p", 100 * p);
  return e;
}

function drawRow(item) {
  const a = item.answer, c = item.cells;
  item.row.className = item === shown ? "on" : "";
  c.count.textContent = a ? a.count : item.error ? "–" : "…";
  c.sure.replaceChildren(...(a ? [percent(a.confidence) + " ", make("small", { textContent: a.certainty })] : []));
  const chart = make("div", { className: "spark", role: "img" });
  if (a) {
    chart.ariaLabel = Object.entries(a.probabilities).map(([n, p]) => `${n}: ${percent(p)}`).join(", ");
    for (const [n, p] of Object.entries(a.probabilities)) chart.append(bar("i", p / a.confidence, +n === a.count));
  }
  c.chances.replaceChildren(a ? chart : "");
  c.agrees.replaceChildren(...[badge(item)].filter(Boolean));
  if (document.activeElement !== item.input) item.input.value = item.quantity;
}

// The large card: one photo
function drawDetail() {
  const item = shown, a = item.answer, busy = !a && !item.error;
  if ($("photo").src !== item.url) { $("photo").src = item.url; $("photo").alt = `The photo ${item.name}`; }
  $("title").textContent = item.name;
  $("ring").className = busy ? "ring busy" : "ring";
  $("ring").style.setProperty("--p", a ? 100 * a.confidence : busy ? 22 : 0);
  $("ring").firstElementChild.textContent = a ? a.count : "–";
  $("words").textContent = a ? things(a.count) : busy ? "Counting…" : "No count";
  $("sure").textContent = a ? `${a.certainty[0].toUpperCase()}${a.certainty.slice(1)}: ${percent(a.confidence)}${range(a)}` : "";
  $("bars").replaceChildren(...Object.entries(a ? a.probabilities : {}).map(([n, p]) => {
    const className = `${+n === a.count ? "top" : ""} ${n === item.quantity ? "record" : ""}`;
    const [left, right] = [things(+n), percent(p)].map(textContent => make("span", { textContent }));
    return make("li", { className }, left, bar("i", p), right);
  }));
  $("problem").textContent = item.error;
  $("problem").hidden = !item.error;
  $("agrees").replaceChildren(a ? badge(item, true) : "");
  if (document.activeElement !== $("quantity")) $("quantity").value = item.quantity;
}

function summary() {
  const done = items.filter(i => i.state === "done"), failed = done.filter(i => i.error).length;
  const odd = done.filter(i => i.answer?.agreement?.verdict === "disagrees").length;
  const parts = [`${done.length} of ${items.length} photos`];
  if (odd) parts.push(`${odd} disagree${odd === 1 ? "s" : ""} with the record`);
  if (failed) parts.push(`${failed} could not be read`);
  return parts.join(" · ");
}

function draw(item) {
  const several = items.length > 1;
  (item ? [item] : items).forEach(drawRow);
  $("detail").hidden = !shown;
  $("list").hidden = !several;
  if (shown) drawDetail();
  if (!several) return;
  $("summary").textContent = summary();
  if (!$("rows").contains(document.activeElement)) sort();
}

// Sorting; photos without a value come last
const KEYS = {
  name: i => i.name,
  count: i => i.answer?.count,
  sure: i => i.answer?.confidence,
  quantity: i => i.quantity === "" ? undefined : +i.quantity,
  agrees: i => i.error ? -1 : { disagrees: 0, unsure: 1, agrees: 2 }[i.answer?.agreement?.verdict],
};

function sort() {
  const key = KEYS[order], rows = [...items];
  if (key) rows.sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return (typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y) * (down ? -1 : 1);
  });
  $("rows").append(...rows.map(i => i.row));
  const direction = down ? "descending" : "ascending";
  for (const th of document.querySelectorAll("th[data-key]")) {
    th.ariaSort = th.dataset.key === order ? direction : "none";
  }
}

// The table as a CSV file; text that a spreadsheet would take for a formula gets an apostrophe in front
function quote(value) {
  const text = String(value ?? ""), formula = /^\s*[=+\-@＝＋－＠]/.test(text) && !/^-?[\d.]+$/.test(text);
  if (formula) return quote("'" + text);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv() {
  const counts = Object.keys(items.find(i => i.answer)?.answer.probabilities || {});
  const head = ["name", "count", "confidence", "certainty", "mean", ...counts.map(n => "p" + n),
    "low", "high", "recorded", "verdict", "p_value", "reason", "error"];
  const line = ({ name, answer: a, quantity, error }) => [name, a?.count, a?.confidence, a?.certainty, a?.mean,
    ...counts.map(n => a?.probabilities[n]), a?.plausible?.low, a?.plausible?.high,
    quantity, ...["verdict", "p_value", "reason"].map(key => a?.agreement?.[key]), error];
  const text = [head, ...items.map(line)].map(row => row.map(quote).join(",") + "\r\n").join("");
  const url = URL.createObjectURL(new Blob(["\ufeff" + text], { type: "text/csv" }));
  make("a", { href: url, download: "binvision.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function clear() {
  for (const item of items) { URL.revokeObjectURL(item.url); item.state = "gone"; item.row.remove(); }
  items.length = 0;
  shown = null;
  document.body.classList.remove("has");
  draw();
  $("files").focus();
  say("Cleared.");
}

async function about() {
  const reply = await fetch("model", { headers: headers() }).catch(() => null);
  if (!reply?.ok) return;
  const { id, card } = await reply.json();
  $("model").textContent = id;
  $("model").hidden = false;
  $("knows").textContent = `The model counts ${card.counts[0]} to ${card.counts.at(-1)} items.`;
}

// What a person can do
if (navigator.maxTouchPoints) document.body.classList.add("touchy");
for (const id of ["files", "camera"]) $(id).addEventListener("change", e => {
  add(e.target.files);
  e.target.value = "";
});
document.addEventListener("paste", e => add([...e.clipboardData.files]));
for (const type of ["dragover", "dragleave", "drop"]) document.addEventListener(type, e => {
  e.preventDefault();
  $("drop").classList.toggle("over", type === "dragover");
  if (type === "drop") add(e.dataTransfer.files);
});
$("quantity").addEventListener("change", e => { record(shown, e.target.value); drawRow(shown); });
for (const th of document.querySelectorAll("th[data-key]")) th.firstElementChild.addEventListener("click", () => {
  down = order === th.dataset.key && !down;
  order = th.dataset.key;
  sort();
});
$("order").addEventListener("change", e => { order = e.target.value; down = order === "count"; sort(); });
$("csv").addEventListener("click", csv);
$("clear").addEventListener("click", clear);
$("access").addEventListener("submit", e => {
  e.preventDefault();
  token = $("token").value.trim();
  sessionStorage.setItem("binvision-token", token);
  $("access").hidden = true;
  for (const item of items) if (item.state === "held") { item.state = "waiting"; item.error = ""; }
  draw();
  fill();
  about();
});
about();
