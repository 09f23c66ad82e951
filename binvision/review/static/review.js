// The review page: one bin at a time, judged by one key. It runs in a browser (HTTP) and in a cell of a notebook (anywidget).

const HELP = [
  ["0 … 9", "that many items"], ["t", "type a larger number"], ["r", "ask for a new photo (retake)"], ["s", "skip: cannot be judged"],
  ["u", "undo, any number of steps"], ["← →", "the bin before, the bin after; judges nothing"], ["n", "the next bin without a judgement"],
  ["+ −", "zoom; = for the whole photo"], ["shift ← → ↑ ↓", "move the enlarged photo"], ["b d", "brighter, darker"],
  ["m", "show or hide what the model thinks"], ["?", "this help"],
];
const AHEAD = 3;  // photos that are loaded ahead
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const things = n => `${n} item${n === 1 ? "" : "s"}`;
const percent = p => p > 0 && p < .005 ? "<1 %" : `${Math.round(100 * p)} %`;
const words = said => said.verdict ?? things(said.count);
const wait = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
const seen = text => String(text).replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu,  // control characters and marks
  c => c.split("").map(unit => "\\u" + unit.charCodeAt(0).toString(16).padStart(4, "0")).join(""));

function make(tag, set = {}, ...children) {
  const e = document.createElement(tag);
  for (const [name, value] of Object.entries(set)) name in e ? e[name] = value : e.setAttribute(name, value);
  e.append(...children.filter(child => child !== null));
  return e;
}

function newKey() {  // crypto.randomUUID is missing where the page comes over plain HTTP from another machine
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), x => x.toString(16).padStart(2, "0")).join("");
}

class Refused extends Error {
  constructor(status, detail) { super(detail); this.status = status; }
}

// Over HTTP

function overHttp(access) {
  const headers = () => access.token ? { Authorization: `Bearer ${access.token}` } : {};
  async function checked(reply) {
    if (reply.ok) return reply;
    const body = await reply.json().catch(() => ({}));
    throw new Refused(reply.status, body.detail || `the server answers ${reply.status}`);
  }
  return {
    async ask(message) {
      const body = JSON.stringify(message), type = { "Content-Type": "application/json" };
      return (await checked(await fetch("ask", { method: "POST", body, headers: { ...headers(), ...type } }))).json();
    },
    async photo(id) { return (await checked(await fetch(`photo?id=${encodeURIComponent(id)}`, { headers: headers() }))).blob(); },
  };
}

// In a notebook: the same messages through the widget

function overWidget(model) {
  const waiting = new Map();
  model.on("msg:custom", (reply, buffers) => {
    const done = waiting.get(reply.number);
    waiting.delete(reply.number);
    done?.(reply, buffers);
  });
  const send = message => new Promise((resolve, reject) => {
    const number = newKey();
    const late = setTimeout(() => { waiting.delete(number); reject(new TypeError("the kernel does not answer")); }, 20000);
    waiting.set(number, (reply, buffers) => {
      clearTimeout(late);
      if (reply.problem) reject(new Refused(reply.problem.status, reply.problem.detail));
      else resolve([reply.answer, buffers]);
    });
    model.send({ number, ...message });
  });
  return {
    async ask(message) { return (await send({ ask: message }))[0]; },
    async photo(id) {
      const [kind, buffers] = await send({ photo: id });
      return new Blob([buffers[0]], { type: kind });
    },
  };
}

// What was judged and is not saved yet: one entry of localStorage each, so that two tabs do not overwrite each other

class Unsaved {
  constructor(place) {
    this.of = place;
    this.place = `binvision-review ${place} `;
    this.list = [];
    try {
      const names = Object.keys(localStorage).filter(name => name.startsWith(this.place)).sort();
      this.list = names.map(name => ({ name, ...JSON.parse(localStorage.getItem(name)) }));
    } catch { /* a browser that keeps nothing: the list is in memory alone */ }
    this.last = this.list.length;
  }
  add(message) {
    const name = this.place + String(Date.now()).padStart(15, "0") + String(this.last++).padStart(6, "0");
    this.list.push({ name, ...message });
    try { localStorage.setItem(name, JSON.stringify(message)); } catch { /* as above */ }
  }
  shift() {
    const { name } = this.list.shift();
    try { localStorage.removeItem(name); } catch { /* as above */ }
  }
}

// The page

class Review {
  constructor(root, access, transport, inPage) {
    Object.assign(this, { root, access, inPage, server: transport });
    this.bin = null;          // the bin that is shown
    this.next = [];           // the bins that come after it
    this.history = [];        // my judgements that count, the last one last
    this.said = new Map();    // id of a bin → what I said
    this.photos = new Map();  // id of a bin → promise of its photo's address
    this.views = new Map();   // id of a bin → what was shown of it, for the way back
    this.times = [];          // when I judged, for the pace
    this.open = false;        // whether the model's answer is shown before I judge
    this.keys = true;         // whether single keys judge
    this.turn = 0;            // counts what is shown, so that a late answer does not replace it
    this.zoom = { z: 1, x: 0, y: 0 };
    this.light = 1;
    this.build();
    this.listen();
    this.begin();
  }

  // The parts

  build() {
    const $ = this.$ = {};
    const button = (name, text, act, more = {}) => $[name] = make("button", { type: "button", textContent: text, onclick: act, ...more });
    const title = make("h1", { textContent: "Review" });
    $.check = make("span", { className: "soft" });
    $.saved = make("span", { className: "saved" });
    const tools = make("div", { className: "tools" },
      button("model", "Model", () => this.toggle(), { "aria-pressed": "false", title: "Show what the model thinks before you judge" }),
      button("csv", "Download", () => this.download("reviews"), { title: "All reviews so far, as a CSV file" }),
      button("fix", "Corrections", () => this.download("corrections"), { title: "What people found wrong, as a CSV file" }),
      button("help", "?", () => this.help(), { ariaLabel: "Help and keys" }));
    $.progress = make("progress", { max: 1, value: 0, ariaLabel: "Judged so far" });
    $.pace = make("p", { className: "pace" });
    const bar = make("header", {}, make("div", { className: "line" }, title, $.check, $.saved, tools), make("div", { className: "line" }, $.progress, $.pace));

    $.photos = make("div", { className: "photos", tabIndex: 0, role: "group", ariaLabel: "Photos, enlarged with plus and minus" });
    $.light = make("input", { type: "range", min: .4, max: 2.5, step: .1, value: 1, ariaLabel: "Brightness" });
    const view = make("div", { className: "view", role: "group", ariaLabel: "View" },
      button("out", "−", () => this.scale(1 / 1.4), { ariaLabel: "Smaller" }), button("fit", "Fit", () => this.fit(), { ariaLabel: "Whole photo" }),
      button("in", "+", () => this.scale(1.4), { ariaLabel: "Larger" }), make("label", { className: "light" }, make("span", { textContent: "Brightness" }), $.light));
    const away = this.inPage ? null : make("p", { className: "away", textContent: "Click here: then keys judge" });  // shown while the notebook gets the keys
    const stage = make("section", { className: "stage", ariaLabel: "Photo" }, $.photos, view, away);

    $.title = make("h2", { tabIndex: -1 });
    $.why = make("p", { className: "soft" });
    $.record = make("div", { className: "record" });
    $.opinion = make("div", { className: "opinion", hidden: true });
    const about = make("section", { className: "about", ariaLabel: "Bin", tabIndex: 0 }, $.title, $.why, $.record, $.opinion);

    const digits = Array.from({ length: 10 }, (_, n) => button(`n${n}`, String(n), () => this.judge({ count: n }), { ariaLabel: things(n) }));
    $.pad = make("div", { className: "pad", role: "group", ariaLabel: "How many items do you see?" }, ...digits.slice(1), digits[0],
      button("more", "10+", () => this.ask(), { ariaLabel: "More than 9 items: type the number" }));
    const verdicts = make("div", { className: "row" }, button("retake", "Retake", () => this.judge({ verdict: "retake" })),
      button("skip", "Skip", () => this.judge({ verdict: "skip" })), button("undo", "Undo", () => this.undo()));
    const moves = make("div", { className: "row" }, button("left", "←", () => this.move(-1), { ariaLabel: "Previous bin" }),
      button("right", "→", () => this.move(1), { ariaLabel: "Following bin" }), button("go", "Next unjudged", () => this.forward()));
    $.last = make("p", { className: "last" });
    const judge = make("section", { className: "judge", ariaLabel: "Judge" }, make("p", { className: "question", textContent: "How many items do you see?" }), $.pad, verdicts, moves, $.last);

    $.alert = make("p", { className: "alert", role: "alert" });
    $.live = make("p", { className: "hide", role: "status" });
    this.buildDialogs();
    const main = make(this.inPage ? "main" : "div", { className: "main" }, stage, make("div", { className: "side" }, about, judge));
    $.all = make("div", { className: "all", hidden: true }, bar, $.alert, main);
    this.root.classList.add("bv-review");
    this.root.replaceChildren($.all, $.live, $.access, $.number, $.keys);
    if (!this.inPage) { this.root.tabIndex = 0; this.root.dataset.lmSuppressShortcuts = "true"; }
  }

  buildDialogs() {
    const $ = this.$;
    $.name = make("input", { id: "bv-name", autocomplete: "off", maxLength: 60, required: true });
    $.token = make("input", { id: "bv-token", type: "password", autocomplete: "off" });
    $.why401 = make("p", { className: "alert" });
    $.access = make("form", { className: "card", hidden: true, method: "dialog" }, make("h2", { textContent: "Who is looking?" }),
      make("p", { className: "soft", textContent: "Your name stands beside each of your judgements." }), $.why401,
      make("label", { htmlFor: "bv-name", textContent: "Your name" }), $.name,
      $.tokenLabel = make("label", { htmlFor: "bv-token", textContent: "Access token, from whoever runs this page" }), $.token,
      make("button", { className: "main-button", textContent: "Start" }));
    $.count = make("input", { id: "bv-count", inputMode: "numeric", pattern: "[0-9]{1,3}", autocomplete: "off", maxLength: 3, required: true });
    $.number = make("dialog", { ariaLabel: "Number of items" }, make("form", { method: "dialog" }, make("label", { htmlFor: "bv-count", textContent: "How many items, 0 to 999?" }),
      $.count, make("div", { className: "row" }, make("button", { className: "main-button", textContent: "Judge" }), make("button", { type: "button", textContent: "Cancel", onclick: () => $.number.close() }))));
    const rows = HELP.map(([key, what]) => make("tr", {}, make("th", { scope: "row" }, make("kbd", { textContent: key })), make("td", { textContent: what })));
    $.single = make("input", { type: "checkbox", checked: true, id: "bv-single" });
    $.keys = make("dialog", { ariaLabel: "Help" }, make("h2", { textContent: "Keys" }), make("table", {}, make("tbody", {}, ...rows)),
      make("p", {}, $.single, " ", make("label", { htmlFor: "bv-single", textContent: "Single keys judge and move (switch off for a screen reader or voice control)" })),
      make("p", { className: "soft", textContent: "A judgement is saved once the page says so. Without a connection it is kept here and sent again. Brightness and zoom change what you see, and nothing else." }),
      make("button", { type: "button", className: "main-button", textContent: "Close", onclick: () => $.keys.close() }));
  }

  // What a person can do

  listen() {
    const $ = this.$, stop = e => e.stopPropagation();
    (this.inPage ? document : this.root).addEventListener("keydown", e => { if (!this.inPage) stop(e); this.key(e); });
    $.access.addEventListener("submit", e => {
      e.preventDefault();
      Object.assign(this.access, { by: $.name.value.trim(), token: $.token.value.trim() || this.access.token });
      this.begin();
    });
    $.number.firstElementChild.addEventListener("submit", () => this.judge({ count: Number($.count.value) }));
    $.single.addEventListener("change", () => { this.keys = $.single.checked; });
    $.light.addEventListener("input", () => this.brighten(Number($.light.value)));
    $.photos.addEventListener("wheel", e => { e.preventDefault(); this.scale(Math.exp(-e.deltaY / 400), e); }, { passive: false });
    $.photos.addEventListener("dblclick", e => this.zoom.z > 1 ? this.fit() : this.scale(2.5, e));
    this.drag();
    if (this.inPage) {
      addEventListener("online", () => this.send());
      addEventListener("beforeunload", e => { if (this.unsaved?.list.length) e.preventDefault(); });
    }
  }

  key(e) {
    const $ = this.$, typed = e.target.closest?.("input, textarea, select, dialog");
    if ($.all.hidden || typed || e.ctrlKey || e.metaKey || e.altKey || e.defaultPrevented || !this.keys) return;
    const pan = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[e.key];
    if (e.shiftKey && pan) { this.pan(...pan); return e.preventDefault(); }
    const once = { t: () => this.ask(), r: () => this.judge({ verdict: "retake" }), s: () => this.judge({ verdict: "skip" }), m: () => this.toggle(), "?": () => this.help() };
    const often = { u: () => this.undo(), n: () => this.forward(), ArrowLeft: () => this.move(-1), ArrowRight: () => this.move(1), "+": () => this.scale(1.4), "-": () => this.scale(1 / 1.4),
      "=": () => this.fit(), b: () => this.brighten(this.light + .2), d: () => this.brighten(this.light - .2) };
    const act = /^[0-9]$/.test(e.key) ? () => this.judge({ count: Number(e.key) }) : once[e.key] ?? often[e.key];
    if (!act) return;
    e.preventDefault();
    if (!e.repeat || often[e.key]) act();  // a key that is held down judges once
  }

  ask() { this.$.count.value = ""; this.$.number.showModal(); }
  help() { this.$.keys.showModal(); }

  toggle() {
    if (this.study) return;
    this.open = !this.open;
    this.$.model.setAttribute("aria-pressed", String(this.open));
    if (this.bin) this.showOpinion();
  }

  // Zoom and brightness

  scale(factor, at) {
    const box = this.$.photos.querySelector(".frame")?.getBoundingClientRect(), { z, x, y } = this.zoom;
    if (!box) return;
    const to = clamp(z * factor, 1, 12), frame = at && (at.target?.closest?.(".frame") ?? null)?.getBoundingClientRect() || box;
    const px = at ? at.clientX - frame.left - frame.width / 2 : 0, py = at ? at.clientY - frame.top - frame.height / 2 : 0;
    this.zoom = { z: to, x: px - (px - x) * to / z, y: py - (py - y) * to / z };
    this.drawZoom();
  }
  pan(dx, dy) { this.zoom.x += dx; this.zoom.y += dy; this.drawZoom(); }
  fit() { this.zoom = { z: 1, x: 0, y: 0 }; this.drawZoom(); }
  brighten(to) { this.light = clamp(Math.round(10 * to) / 10, .4, 2.5); this.$.light.value = this.light; this.drawZoom(); }

  drawZoom() {
    const frame = this.$.photos.querySelector(".frame");
    if (!frame) return;
    const room = { x: frame.clientWidth * (this.zoom.z - 1) / 2, y: frame.clientHeight * (this.zoom.z - 1) / 2 };
    for (const side of "xy") this.zoom[side] = clamp(this.zoom[side], -room[side], room[side]);
    for (const image of this.$.photos.querySelectorAll("img")) {
      image.style.transform = `translate(${this.zoom.x}px, ${this.zoom.y}px) scale(${this.zoom.z})`;
      image.style.filter = this.light === 1 ? "" : `brightness(${this.light})`;
    }
    this.$.photos.classList.toggle("large", this.zoom.z > 1);
  }

  drag() {
    const down = new Map(), box = this.$.photos;
    const middle = () => { const all = [...down.values()]; return { clientX: all.reduce((s, p) => s + p.clientX, 0) / all.length, clientY: all.reduce((s, p) => s + p.clientY, 0) / all.length }; };
    const apart = () => { const [a, b] = down.values(); return b ? Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) : 0; };
    box.addEventListener("pointerdown", e => { down.set(e.pointerId, e); box.setPointerCapture(e.pointerId); });
    box.addEventListener("pointermove", e => {
      if (!down.has(e.pointerId)) return;
      const before = middle(), far = apart();
      down.set(e.pointerId, e);
      const now = middle();
      if (far) this.scale(apart() / far, { ...now, target: e.target });
      if (this.zoom.z > 1) this.pan(now.clientX - before.clientX, now.clientY - before.clientY);
    });
    for (const end of ["pointerup", "pointercancel"]) box.addEventListener(end, e => down.delete(e.pointerId));
  }

  // Opening

  async begin() {
    const $ = this.$, { access } = this;
    if (!access.by) return this.enter("");
    let about;
    try { about = await this.server.ask({ what: "open", by: access.by }); }
    catch (e) {
      if (e instanceof Refused && (e.status === 401 || e.status === 422)) return this.enter(e.status === 401 ? access.token ? "This token is wrong." : "This page asks for an access token." : e.message);
      this.problem(e instanceof Refused ? e.message : "The server cannot be reached. Trying again…");
      $.all.hidden = false;
      await wait(2);
      return this.begin();
    }
    access.keep?.();
    Object.assign(this, { study: about.study, n: about.n, left: about.left, mine: about.mine, history: about.history, next: about.next });
    const place = `${about.findings} ${access.by}`;
    if (this.unsaved?.of !== place) this.unsaved = new Unsaved(place);
    for (const message of this.unsaved.list) this.remember(message);
    $.access.hidden = true;
    $.all.hidden = false;
    $.model.hidden = $.fix.hidden = this.study;
    $.check.textContent = seen(`${about.check} · ${access.by}`);
    this.problem(about.notes.join(". "));
    this.send();
    this.forward();
  }

  enter(why) {
    const $ = this.$;
    $.all.hidden = true;
    $.access.hidden = false;
    $.name.value = this.access.by || "";
    $.why401.textContent = why;
    $.why401.hidden = !why;
    $.token.hidden = $.tokenLabel.hidden = !/token/.test(why);
    (this.access.by ? $.token : $.name).focus();
    this.say(why);
  }

  // Judging: the next bin is shown at once, and the judgement is sent behind it

  judge(said) {
    const { bin } = this;
    if (!bin) return;
    const seconds = Math.round(performance.now() - this.since) / 1000;
    const message = { what: "judge", bin: bin.id, ...said, seconds, shown: this.visible(), key: newKey() };
    this.times.push(Date.now());
    this.unsaved.add(message);
    this.remember(message);
    this.send();
    this.forward(`You said ${words(said)}. `);
  }

  undo() {
    const last = this.history.at(-1);
    if (!last) return this.say("There is nothing to undo.");
    const message = { what: "undo", undo: last.undo, bin: last.bin, key: newKey() };
    this.unsaved.add(message);
    this.remember(message);
    this.send();
    this.putBack();
    this.visit({ bin: last.bin }, "Taken back. ");
  }

  remember(message) {
    const { bin } = message, earlier = () => this.history.findLast(h => h.bin === bin);
    if (message.what === "undo") {
      this.history = this.history.filter(h => h.undo !== message.undo);
      this.said.set(bin, earlier()?.said ?? null);
      if (!earlier()) { this.mine--; this.left++; }
      return;
    }
    if (!earlier()) { this.mine++; this.left = Math.max(0, this.left - 1); }
    const said = { count: message.count, verdict: message.verdict };
    this.said.set(bin, said);
    this.history.push({ bin, undo: message.key, said });
  }

  judged(bin) { return this.said.has(bin.id) ? this.said.get(bin.id) : bin.mine; }

  async send() {
    if (this.sending || !this.unsaved) return;
    this.sending = true;
    for (let tries = 0; this.unsaved.list.length;) {
      this.draw();
      const { name, ...message } = this.unsaved.list[0];
      try {
        const reply = await this.server.ask({ ...message, by: this.access.by });
        this.unsaved.shift();
        tries = 0;
        if (this.offline) this.say("Saved.");
        this.offline = false;
        this.replied(message, reply);
      } catch (e) {
        if (e instanceof Refused && e.status === 401) { this.sending = false; return this.enter("This token is wrong."); }
        if (e instanceof Refused && e.status < 500) {
          this.unsaved.shift();
          this.problem(`Not saved: ${e.message}`);
          this.drop(message);
          continue;
        }
        this.offline = e instanceof Refused ? e.message : "the server cannot be reached";
        if (!tries) this.say(`Not saved: ${this.offline}. It is kept here and sent again.`);
        this.draw();
        await wait(Math.min(2, .1 * 2 ** tries++));
      }
    }
    this.sending = false;
    this.draw();
  }

  drop(message) {
    if (message.what === "judge") this.remember({ what: "undo", undo: message.key, bin: message.bin });
    this.draw();
  }

  replied(message, reply) {
    if (!this.unsaved.list.length) this.left = reply.left;
    this.take(reply.next);
    if (message.what !== "judge" || !reply.model) return;
    const { recorded, low, high } = reply.model, range = low === null ? "" : low === high ? `; plausible is ${low}` : `; plausible are ${low} to ${high}`;
    this.$.last.textContent = `${seen(message.bin)}: you said ${words(message)}; the record says ${recorded}${range}.`;
  }

  take(bins) {
    const waiting = this.unsaved.list, undone = new Set(waiting.filter(message => message.what === "undo").map(message => message.bin));
    if (!waiting.length) for (const bin of bins) this.said.set(bin.id, null);  // all was said: the server knows better
    const back = this.next.filter(bin => undone.has(bin.id));  // taken back here, which this answer does not know yet
    const all = new Map([...bins, ...back].map(bin => [bin.id, bin]));
    this.next = [...all.values()].filter(bin => bin.id !== this.bin?.id && !this.said.get(bin.id)).sort((a, b) => a.place - b.place);
    this.load();
  }

  load() { for (const bin of this.next.slice(0, AHEAD)) for (const id of bin.photos) this.picture(id); }

  // Moving

  async forward(say = "") {
    const turn = ++this.turn, after = this.bin?.place ?? 0;
    this.putBack();
    this.next = this.next.filter(bin => !this.judged(bin));
    if (!this.next.length) {
      this.clear(this.offline ? `No connection: ${this.offline}. What you judged is kept here.` : "Loading…");
      while (this.unsaved.list.length && turn === this.turn) await wait(.02);
      if (turn !== this.turn) return;
      try { this.take((await this.server.ask({ what: "next", by: this.access.by })).next); }
      catch (e) {
        this.problem(e instanceof Refused ? e.message : "The server cannot be reached: the next bin cannot be loaded.");
        await wait(1);
        return turn === this.turn && this.forward(say);
      }
      if (turn !== this.turn) return;
    }
    const bin = this.next.find(bin => bin.place > after) ?? this.next[0];
    if (bin) return this.show(bin, say);
    this.clear("All done: no bin of this queue waits for you. Thank you!");
    this.say("All done.");
  }

  move(step) {
    const place = (this.bin?.place ?? this.n + 1) + step;
    if (place < 1 || place > this.n) return this.say(step < 0 ? "This is the first bin." : "This is the last bin.");
    this.putBack();
    this.visit({ place });
  }

  putBack() {  // the bin that is left without a judgement comes again
    if (this.bin && !this.judged(this.bin) && !this.next.some(bin => bin.id === this.bin.id)) this.next.unshift(this.bin);
  }

  async visit(which, say = "") {
    const turn = ++this.turn;
    const here = [...this.next, ...this.views.values()].find(bin => bin.id === which.bin || bin.place === which.place);
    try {
      const bin = here ?? await this.server.ask({ what: "bin", by: this.access.by, ...which });
      if (turn === this.turn) this.show(bin, say);
    } catch (e) { this.problem(e instanceof Refused ? e.message : "The server cannot be reached: this bin cannot be loaded."); }
  }

  // Showing

  picture(id) {
    if (!this.photos.has(id)) {
      const made = this.server.photo(id).then(async blob => {
        const url = URL.createObjectURL(blob), image = new Image();
        image.src = url;
        await image.decode();
        return url;
      });
      made.catch(() => this.photos.delete(id));
      this.photos.set(id, made);
      if (this.photos.size > 60) {
        const [old, url] = this.photos.entries().next().value;
        this.photos.delete(old);
        url.then(URL.revokeObjectURL, () => {});
      }
    }
    return this.photos.get(id);
  }

  frame(bin, id) {
    const own = id === bin.id, later = bin.photos.indexOf(id) > bin.photos.indexOf(bin.id);
    const name = own ? "This bin" : later ? "After" : "Before", image = make("img", { alt: own ? `Photo of bin ${seen(id)}` : `${name}: photo of ${seen(id)}`, draggable: false });
    const caption = bin.photos.length > 1 ? make("figcaption", { textContent: own ? name : `${name}: ${seen(id)}` }) : null;
    const frame = make("div", { className: "frame" }, image);
    this.picture(id).then(url => { image.src = url; if (own) this.root.dataset.shown = bin.id; }, e => {
      frame.replaceChildren(make("p", { className: "gone", textContent: e instanceof Refused ? seen(e.message) : "The photo cannot be loaded." }));
    });
    return make("figure", { className: own ? "own" : "" }, frame, caption);
  }

  show(bin, say = "") {
    const $ = this.$;
    this.bin = bin;
    this.next = this.next.filter(other => other.id !== bin.id);
    this.views.set(bin.id, bin);
    if (this.views.size > 200) this.views.delete(this.views.keys().next().value);
    this.since = performance.now();
    $.photos.replaceChildren(...bin.photos.map(id => this.frame(bin, id)));
    $.photos.classList.toggle("several", bin.photos.length > 1);
    this.fit();
    $.title.textContent = `Bin ${seen(bin.id)}`;
    const mine = this.judged(bin);
    $.why.textContent = [`${bin.place} of ${this.n}`, bin.why, mine && `you said ${words(mine)}`].filter(Boolean).join(" · ");
    $.record.replaceChildren(...this.recordOf(bin));
    for (const name of Object.keys($)) if (/^n[0-9]$/.test(name)) $[name].classList.toggle("on", mine?.count === Number(name[1]));
    this.showOpinion();
    this.load();
    this.draw();
    const record = bin.recorded === null ? "" : ` The record says ${things(bin.recorded)}.`;
    this.say(`${say}Bin ${seen(bin.id)}, ${bin.place} of ${this.n}.${record}${mine ? ` You said ${words(mine)}.` : ""}`);
  }

  clear(text) {
    this.bin = null;
    this.$.photos.replaceChildren(make("p", { className: "gone", textContent: text }));
    this.$.title.textContent = this.$.why.textContent = "";
    this.$.record.replaceChildren();
    this.$.opinion.hidden = true;
    this.draw();
  }

  recordOf(bin) {
    if (this.study) return [];
    if (!bin.items.length) return [make("p", { textContent: bin.recorded === null ? "No record." : `The record says ${things(bin.recorded)}, and lists none.` })];
    const head = make("tr", {}, ...["Qty", "Item", "Size, in", "lb"].map(text => make("th", { scope: "col", textContent: text })));
    const rows = bin.items.map(item => make("tr", {}, make("td", { className: "quantity", textContent: item.quantity }), make("td", { textContent: seen(item.name) }),
      make("td", { className: "size", textContent: item.size }), make("td", { className: "size", textContent: item.weight })));
    const table = make("table", {}, make("caption", { textContent: `The record: ${things(bin.recorded)}` }), make("thead", {}, head), make("tbody", {}, ...rows));
    return [table, bin.problem ? make("p", { className: "alert", textContent: seen(bin.problem) }) : null].filter(Boolean);
  }

  visible() { return Boolean(this.bin) && !this.study && (this.open || Boolean(this.judged(this.bin))); }

  async showOpinion() {
    const { bin, turn } = this, box = this.$.opinion;
    box.hidden = !this.visible();
    if (box.hidden) return;
    box.replaceChildren(make("p", { className: "soft", textContent: "What the model thinks…" }));
    let said;
    try { said = (await this.server.ask({ what: "model", by: this.access.by, bin: bin.id })).model; } catch { return; }
    if (turn !== this.turn || !said) return;
    const bars = said.bars.map(([count, p]) => {
      const bar = make("i", { ariaHidden: "true" });
      bar.style.setProperty("--p", 100 * p);
      return make("li", { className: count === said.count ? "top" : "" }, make("span", { textContent: count }), bar, make("span", { textContent: percent(p) }));
    });
    box.replaceChildren(make("h3", { textContent: "The model" }), make("p", { textContent: seen(said.says) }), make("ul", { ariaLabel: "Probability of each count" }, ...bars));
  }

  draw() {
    const $ = this.$, waiting = this.unsaved?.list.length ?? 0, done = this.mine + this.left ? this.mine / (this.mine + this.left) : 1;
    $.progress.value = done;
    $.saved.textContent = !waiting ? this.mine ? "saved" : "" : this.offline ? `${waiting} not saved: ${this.offline}; kept here and sent again` : `saving ${waiting}…`;
    $.saved.classList.toggle("bad", Boolean(waiting && this.offline));
    const times = this.times.slice(-20), minutes = (times.at(-1) - times[0]) / 60000, rate = times.length > 2 && minutes > 0 ? (times.length - 1) / minutes : 0;
    const pace = rate ? ` · ${rate < 10 ? rate.toFixed(1) : Math.round(rate)} a minute · about ${Math.max(1, Math.round(this.left / rate))} min left` : "";
    $.pace.textContent = `${this.mine} judged by you · ${this.left} of ${this.n} left${pace}`;
    const at = document.activeElement;
    $.undo.disabled = !this.history.length;
    for (const name of Object.keys($)) if (/^n[0-9]$|^more$|^retake$|^skip$/.test(name)) $[name].disabled = !this.bin;
    if (at?.disabled && this.root.contains(at)) $.photos.focus();  // a button that is switched off would lose the keys
  }

  problem(text) { this.$.alert.textContent = seen(text); this.$.alert.hidden = !text; }
  say(text) { this.$.live.textContent = text; }

  async download(what) {
    try {
      const { name, text } = await this.server.ask({ what, by: this.access.by });
      const url = URL.createObjectURL(new Blob(["\ufeff" + text], { type: "text/csv" }));
      make("a", { href: url, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    } catch (e) { this.problem(e instanceof Refused ? e.message : "The server cannot be reached."); }
  }
}

// In a browser: who looks, and the token, come in the address behind # (which no server sees) or are asked for

function inBrowser(root) {
  const given = new URLSearchParams(location.hash.slice(1)), kept = name => { try { return sessionStorage.getItem(`binvision-${name}`); } catch { return null; } };
  const access = { by: given.get("by") || kept("by"), token: given.get("token") || kept("token") };
  access.keep = () => { try { for (const name of ["by", "token"]) if (access[name]) sessionStorage.setItem(`binvision-${name}`, access[name]); } catch { /* asked again */ } };
  if (location.hash) history.replaceState(null, "", location.pathname);
  return new Review(root, access, overHttp(access), true);
}

function render({ model, el }) {
  const root = make("div");
  el.append(root);
  new Review(root, { by: model.get("by") }, overWidget(model), false);
}

const root = document.getElementById("binvision-review");
if (root) inBrowser(root);
export default { render };
