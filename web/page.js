"use strict";
// The live page: one more client of the public API. It asks for what is true, and draws it.
// What was too fast to see it shows again in moments, and says so; what waits it counts down.

const ADDRESS = { name: "Ada Lovelace", line1: "12 Analytical Row", postalCode: "10115", country: "DE" };
const EXAMPLES = {
  good: { items: [{ sku: "A1", quantity: 2, price: 19.99 }] },
  out: { items: [{ sku: "E5", quantity: 1, price: 120 }] },
  bad: { items: [{ sku: "A1", quantity: 1, price: 9.999 }] },
  jam: { items: [{ sku: "B2", quantity: 1, price: 5 }], shippingAddress: { ...ADDRESS, city: "Jam" } },
};
const CUSTOMERS = ["ada", "grace", "joan", "mary", "lin", "eve"];
const STANDARD = ["inventory", "shipping", "email"].map((name) => ({ name, takes: [] })); // before a consumer reported
const FLOW = ["order_created", "inventory_reserved", "?", "order_confirmed", "order_failed", "order_cancelled"];
const STATUS = { order_created: "pending", order_confirmed: "processed", order_failed: "failed",
  order_cancelled: "cancelled" };
const LEGEND = { done: "done", pending: "pending", retrying: "a try failed, another comes",
  parked: "parked: needs a person", failed: "failed: a proper end", cancelled: "cancelled",
  refused: "refused, never stored", token: "the order is here" };
const CRASHES = { // what went wrong, what saves the order, what would be without it, what to read
  A: ["before the write", "No answer comes, so the client asks again with the same Idempotency-Key: one order, however"
    + " often.", "two orders for one click.", "core/store/orders.py", "Orders.create"],
  B: ["stored, not yet sent", "The event was saved in the same write as the order, so it is still in the outbox. The"
    + " sweep finds it and sends it.", "the order is pending for ever, and nobody was told.",
    "core/flow/sweep.py", "Sweep._look"],
  C: ["sent, outbox not cleared", "It is sent again. The handler finds its step already recorded and only acks.",
    "two labels and two mails for one order.", "core/order/state_machine.py", "outcome_of"],
  D: ["worked, nothing recorded", "No ack, so it is delivered again. The stock taken was a pending move; the sweep rolls"
    + " it back.", "a unit is gone that nobody bought.", "core/flow/sweep.py", "Sweep._end_moves"],
  E: ["recorded, not acked", "It is delivered again. The step is there, so it is acked without work.",
    "the whole step runs twice.", "consumer.py", "Worker.run_step"],
  F: ["copied on, not acked", "The copy is confirmed before the ack, so the message may come twice, never not at all.",
    "the failing message vanishes and nobody notices.", "core/bus/rabbit.py", "RabbitDelivery._forward"],
};
const MOMENT = 600, AT_ONCE = 400; // ms a moment is shown; ms without news that are still drawn to scale

const page = { // all that is drawn follows from this
  key: sessionStorage.getItem("key") || "", denied: false, down: false, looksAgain: 0, offset: 0, placed: 0,
  orders: [], handlers: STANDARD, delays: [], stock: [], ready: {}, editing: null,
  chosen: null, order: null, events: [], refused: null, notice: "",
  moment: null, playing: false, step: null, letter: null, whole: false,
};

// --- small tools

const $ = (id) => document.getElementById(id);
const now = () => Date.now() + page.offset;
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const causeOf = (line) => line.of ?? line.done ?? line.failed ?? line.parked ?? line.lost; // the event a step took
const money = (order) => `${order.total} ${order.currency}`;
const short = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
const goods = ({ items: [first, ...more] }) => `${first.quantity} × ${first.sku}${more.length ? ", …" : ""}`;
const narrow = () => innerWidth < 900;
const kindOf = (line) => (line.failed ? "retrying" : line.parked ? "parked" : line.event === "order_failed" ? "failed"
  : line.lost || line.event === "order_cancelled" ? "cancelled" : "done");
const times = (n) => ["never", "once", "twice"][n] ?? `${n} times`;
const words = (list) => list.join(", ").replace(/, ([^,]*)$/, " and $1");

function span(ms) {
  const seconds = ms / 1000;
  if (ms < 1000) return `${Math.max(0, Math.round(ms))} ms`;
  return seconds < 120 ? `${+seconds.toFixed(seconds < 10 ? 1 : 0)} s` : `${Math.round(seconds / 60)} min`;
}

const html = (tag, ...rest) => build(document.createElement(tag), ...rest);
const svg = (tag, ...rest) => build(document.createElementNS("http://www.w3.org/2000/svg", tag), ...rest);
const icon = (kind) => svg("svg", { class: `icon ${kind}`, "aria-hidden": true }, svg("use", { href: `#${kind}` }));

function build(node, attributes = {}, ...inside) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value != null) node.setAttribute(name, value);
  }
  node.append(...inside); // text becomes a text node: nothing that anybody sent is ever read as HTML
  return node;
}

/** Show a node for each item. What has not changed stays as it is, and the focus where it was. */
function fill(box, items, make) {
  const focus = box.contains(document.activeElement) && document.activeElement.dataset.key;
  const old = new Map([...box.children].map((node) => [node.shows, node]));
  const wanted = items.map((item) => JSON.stringify(item));
  const nodes = wanted.map((text, i) => old.get(text) ?? Object.assign(make(items[i], i), { shows: text }));
  for (const node of old.values()) if (!nodes.includes(node)) node.remove();
  nodes.forEach((node, i) => box.children[i] !== node && box.insertBefore(node, box.children[i] ?? null));
  if (focus && !box.contains(document.activeElement)) box.querySelector(`[data-key="${CSS.escape(focus)}"]`)?.focus();
}

/** The lines of a value as JSON.stringify(value, null, 1) writes them, each with the JSON Pointer it belongs to. */
function jsonLines(value, pointer = "", lead = "", key = "", end = "") {
  const inner = value && typeof value === "object" ? Object.entries(value) : [];
  if (!inner.length) return [{ pointer, key: lead + key, text: JSON.stringify(value) + end }];
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const lines = inner.flatMap(([name, part], i) => jsonLines(
    part, `${pointer}/${name.replace(/~/g, "~0").replace(/\//g, "~1")}`, lead + " ",
    Array.isArray(value) ? "" : JSON.stringify(name) + ": ", i + 1 < inner.length ? "," : ""));
  return [{ pointer, key: lead + key, text: open }, ...lines, { pointer, key: lead, text: close + end }];
}

// --- the API

async function api(path, method = "GET", body, headers = {}) {
  const asked = page.key && { Authorization: `Bearer ${page.key}`, ...headers };
  const type = body && { "Content-Type": "application/json" };
  let answer;
  try { // the browser's cache asks with If-None-Match, and takes a 304 for what it has
    answer = await fetch(path, { method, body, cache: "no-cache", headers: { ...asked, ...type } });
  } catch (error) {
    page.down = true;
    throw error;
  }
  const skew = Date.parse(answer.headers.get("Date")) - Date.now();
  page.offset = Math.abs(skew) > 2000 ? skew : 0;
  if (answer.status === 401) page.denied = true;
  return { status: answer.status, data: await answer.json() };
}

async function get(path) {
  const { status, data } = await api(path);
  if (status !== 200) throw new Error(`${path}: ${status}`);
  page.denied = false;
  return data;
}

/** Ask again and again: `look` gives the milliseconds until then. Not in a hidden tab, nor where nobody answers. */
async function keep(look, always = false) {
  for (let wait = 0, failures = 0; ; await sleep(wait)) {
    wait = 300;
    if (document.hidden || (!always && (page.down || page.denied))) continue;
    try {
      wait = await look();
      failures = 0;
    } catch {
      wait = Math.min(5000, 1000 * 2 ** failures++);
    }
    if (always) page.looksAgain = Date.now() + wait;
    render();
  }
}

async function lookAtOrder() {
  const id = page.chosen;
  if (!id) return 300;
  const order = await get(`orders/${id}`);
  if (order.timeline.length !== page.order?.timeline.length || page.order.id !== id) {
    page.events = (await get(`orders/${id}/events`)).events;
  }
  if (page.chosen === id) page.order = order;
  return order.status === "pending" || troubleOf(order) || order.outbox || unfinished(order).length ? 300 : 1000;
}

async function lookAtHandlers() {
  const { handlers, retryDelays } = await get("handlers");
  const turn = ({ takes }) => Math.min(...takes.map((type) => FLOW.indexOf(FLOW.includes(type) ? type : "?")));
  handlers.sort((a, b) => turn(a) - turn(b));
  Object.assign(page, { handlers: handlers.length ? handlers : STANDARD, delays: retryDelays });
  return 1000;
}

async function lookAtHealth() {
  page.ready = (await api("readyz")).data;
  page.down = false;
  return 3000;
}

/** Place an order; where no answer comes, again under the same key: so it is one order, however often. */
async function place(body, key = [...crypto.getRandomValues(new Uint8Array(16))].join("")) {
  let answer;
  while (!answer) {
    answer = await api("orders", "POST", body, { "Idempotency-Key": key }).catch(render);
    if (!answer) await sleep(2000);
  }
  if (answer.status === 201) {
    choose(answer.data.id, answer.data);
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) Object.assign(page, { moment: 0, playing: true });
  }
  return answer;
}

function choose(id, order = null) {
  const fresh = { refused: null, notice: "", moment: null, playing: false, step: null, letter: null, events: [] };
  Object.assign(page, fresh, { chosen: id, order });
  history.replaceState(null, "", `#order=${id}`);
  render();
}

async function act(name) {
  const { status, data } = await api(`orders/${page.order.id}/${name}`, "POST");
  if (status === 200) Object.assign(page, { order: data, moment: null, notice: "" });
  else page.notice = data.detail ?? data.title;
  render();
}

// --- what an order says

function takersOf(type, order) {
  const took = (name) => order.timeline.some((line) => line.by === name && causeOf(line) === type);
  return page.handlers.filter(({ name, takes }) => takes.includes(type) || took(name)).map(({ name }) => name);
}

/** [handler, event type] of the steps still asked for; superseded is what its taker is told is over. */
function unfinished(order) {
  const announced = order.timeline.map((line) => line.event).filter(Boolean);
  const over = announced.find((type) => ["order_failed", "order_cancelled"].includes(type));
  return announced.flatMap((type) => takersOf(type, order).map((name) => [name, type])).filter(([name, type]) => {
    const superseded = over && over !== type && takersOf(over, order).includes(name);
    return !superseded && !order.timeline.some((line) => line.by === name && causeOf(line) === type && !line.failed);
  });
}

/** The step that is parked or waits for its next try, if there is one. */
function troubleOf(order) {
  const { parked = [], timeline } = order;
  if (parked.length) return { kind: "parked", line: timeline.findLast((line) => line.parked && line.by === parked[0]) };
  const newest = unfinished(order).map(([name, type]) =>
    timeline.findLast((line) => line.by === name && causeOf(line) === type));
  const line = newest.find((each) => each?.failed);
  return line && { kind: "retrying", line };
}

/** What happened, moment by moment: how many lines of the timeline, what was sent, where the order was. */
function momentsOf(order) {
  const sent = [];
  const moments = [{ name: "a request", lines: 0, tokens: [["api"]], letter: "A", sent: [],
    say: "The client sends POST /orders. Nothing is stored yet." }];
  const add = (moment) => moments.push({ sent: [...sent], outbox: [], ...moment });
  order.timeline.forEach((line, lines) => {
    const cause = causeOf(line);
    if (cause && !sent.includes(cause)) {
      const names = takersOf(cause, order), all = words(names), at = (where) => names.map((name) => [where, name]);
      add({ name: "sent to the exchange", lines, outbox: [cause], tokens: [["exchange"]], letter: "C",
        say: `${cause} goes to the broker. It leaves the outbox once the broker has confirmed it.` });
      sent.push(cause);
      add({ name: `in ${names.length > 1 ? `${names.length} queues` : `${all}'s queue`}`, lines, tokens: at("queue"),
        letter: "C", say: `The exchange copies ${cause} into the queue of each handler that takes it: ${all}.` });
      add({ name: `${all} at work`, lines, tokens: at("handler"), letter: "D",
        say: `Until the work is done nothing is recorded, and the message is not acked: it would come again.` });
    }
    add({ lines: lines + 1, ...wordsOf(line, cause) });
  });
  return moments;
}

function wordsOf(line, cause) {
  const { by, event } = line, stored = { name: "one write", outbox: [event], tokens: [["outbox"]] };
  if (event === "order_created") return { ...stored, letter: "B", say: "The order and the event it owes, order_created,"
    + " are one document, so one write keeps both or neither. Now the API answers 201." };
  if (event && by === "api") return { ...stored, letter: "B", say: `The new status and ${event}: both or neither.` };
  if (event) return { ...stored, letter: "E", say: `${by} is done. Its step and the next event, ${event}, go into the`
    + " order together: a crash keeps both or neither. Then the message is acked." };
  if (line.failed) return { name: `try ${line.try} failed`, tokens: [["wait", by]], letter: "F", say: `${line.error}. A copy`
    + ` of ${cause} waits in ${by}'s retry queue; nobody else waits for it, and what is done does not run again.` };
  if (line.parked) return { name: "parked", tokens: [["dead", by]], letter: "F", say: `${line.error}, and that was the last`
    + ` try. The message is kept in ${by}'s dead-letter queue until a person decides.` };
  if (line.sent) return { name: "sent again", tokens: [["exchange"]], letter: "B", say: `No message would have moved this`
    + ` order on, so the sweep sent ${line.sent} again.` };
  if (line.lost) return { name: "too late", tokens: [["order"]], letter: "E", say: `${by} answered ${cause}, but the order`
    + " had moved on: what it did is undone." };
  return { name: "one write", tokens: [["order"]], letter: "E", say: `${by} is done, and that is recorded. It announces`
    + " nothing, so nothing follows." };
}

/** What is drawn: a moment of the replay, or how it is now. */
function sceneOf(order, moment) {
  if (page.refused) return { code: page.refused.status, lines: [], sent: [], tokens: [["api"]], letter: "A" };
  if (!order) return { lines: [], sent: [], tokens: [], letter: "B" };
  const { timeline, outbox = [], parked = [] } = order;
  if (moment) {
    const lines = timeline.slice(0, moment.lines);
    const status = STATUS[lines.findLast((line) => STATUS[line.event])?.event];
    return { ...moment, code: status && 201, lines, status, parked: [] };
  }
  const sent = timeline.map((line) => line.event).filter((type) => type && !outbox.includes(type));
  const queued = unfinished(order).filter(([, type]) => sent.includes(type)).map(([name, type]) => {
    const newest = timeline.findLast((line) => line.by === name && causeOf(line) === type);
    return [newest?.failed && Date.parse(newest.next) > now() ? "wait" : "queue", name];
  });
  const tokens = outbox.length ? [["outbox"]] : [...parked.map((name) => ["dead", name]), ...queued];
  const fanned = sent.some((type) => takersOf(type, order).length > 1);
  const letter = troubleOf(order) ? "F" : fanned ? "C" : "B";
  return { code: 201, lines: timeline, sent, outbox, parked, status: order.status, letter,
    tokens: tokens.length ? tokens : [["order"]] };
}

/** Headline and paragraph: {kind, title, text, timer}. */
function storyOf(order, moment, moments) {
  const left = (ms) => `in ${Math.max(0, Math.ceil((ms - now()) / 1000))} s`;
  if (page.denied) return { kind: "refused", title: page.key ? "This key is not known" : "Which key?",
    text: "Paste an API key into the field above. `make run` prints a link that brings it along." };
  if (page.down) return { kind: "refused", title: "The API does not answer", text: "What was answered 201 is stored.",
    timer: `Trying again ${left(page.looksAgain + page.offset)}.` };
  if (page.refused) {
    const { status, title, detail, errors = [] } = page.refused, n = errors.length;
    const why = errors.map(({ pointer, message }) => `${pointer} ${message}. `).join("") || `${detail ?? ""}. `;
    return { kind: "refused", text: `${why}Nothing was stored, so nothing was sent.`,
      title: n ? `Refused: ${n === 1 ? "one fault" : `${n} faults`} in the body` : `Refused: ${status} ${title}` };
  }
  if (!order) return { kind: "pending", title: page.chosen ? "One moment" : "No order yet", text: "Press Good order. Its way"
    + " is drawn here as it goes: stored, announced, queued, handled, answered, and what happens when a step fails." };
  const { status, timeline, outbox } = order, last = timeline.at(-1), took = Date.parse(last.at) - Date.parse(order.createdAt);
  if (moment) {
    const gaps = timeline.slice(1).map((line, i) => Date.parse(line.at) - Date.parse(timeline[i].at));
    const burst = gaps.filter((gap) => gap <= AT_ONCE).reduce((a, b) => a + b, 0), slower = (moments.length * MOMENT) / (burst || 1);
    const digits = 10 ** Math.floor(Math.log10(slower)), pace = slower > 2 ? `about ${Math.round(slower / digits) * digits} times slower than it was` : "without its waits";
    return { kind: "pending", title: `Replay, moment ${page.moment + 1} of ${moments.length}: ${moment.name}`,
      text: `${moment.say} Shown ${pace}.` };
  }
  const trouble = troubleOf(order), first = status === "pending" ? "" : `${status[0].toUpperCase()}${status.slice(1)}, but `;
  if (trouble?.kind === "parked") {
    const { by, try: tries } = trouble.line ?? { by: order.parked[0], try: "several" };
    return { kind: "parked", title: first ? `${first}${by} is parked` : `Parked: ${by} failed ${times(tries)}`,
      text: `Nothing is lost: the message lies in ${by}'s dead-letter queue, and the order knows it. Mend the handler, then`
        + ` press Redrive (the same as python consumer.py redrive ${by}).` };
  }
  if (trouble) {
    const { by, try: tries, error, where, next } = trouble.line, due = Date.parse(next);
    const which = `Try ${tries + 1}${page.delays.length ? ` of ${page.delays.length + 1}` : ""}`;
    return { kind: "retrying", title: first ? `${first}${by} failed ${times(tries)}` : `Retrying: ${by} failed ${times(tries)}`,
      text: `${error}${where ? ` at ${where}` : ""}. What is done does not run again, and no other order waits for this one.`,
      timer: due > now() ? `${which} is due ${left(due)}.` : `${which} is due now.` };
  }
  if (outbox && page.ready.broker === "down") return { kind: "pending", title: "Accepted, and safe without the broker",
    text: "The API answered 201 although the broker is away. The event waits in the outbox, on disk with the order, and goes"
      + " out when the broker is back." };
  const [name, type] = unfinished(order)[0] ?? [];
  if ((name || status === "pending") && now() - Date.parse(last.at) > 5000) return { kind: "pending",
    title: `${first || "Waiting: "}nobody takes ${name ? `${name}'s` : "its"} queue`, text: `${type ?? last.event} waits, and`
      + " nothing is lost meanwhile. Is a consumer running? (python consumer.py)" };
  if (status === "pending") return { kind: "pending", title: "Under way",
    text: name ? `${name} has been asked: ${type} is in its queue.` : `${last.by} has announced ${last.event}.` };
  if (status === "processed") return { kind: status, title: `Processed in ${span(took)}`, text: "No handler calls another."
    + " Each writes its step and the next event into the order, in one write; the broker carries the event on." };
  const told = words(takersOf(`order_${status}`, order)) || "every handler that takes it";
  const failer = timeline.findLast((line) => line.event === "order_failed")?.by ?? "a handler";
  const undone = `order_${status} went to ${told} at once: stock is given back, the label void, the customer told.`;
  if (status === "failed") return { kind: status, title: `Failed: ${(order.failureReason ?? "").replaceAll("_", " ")}`,
    text: `Not an error but an answer, given by ${failer} for ${goods(order)}. The event ${undone}` };
  return { kind: status, title: `Cancelled after ${span(Date.parse(order.updatedAt) - Date.parse(order.createdAt))}`,
    text: undone[0].toUpperCase() + undone.slice(1) };
}

// --- the picture: the map on the left, and each handler's row runs on in time to the right (below it, where narrow)

const WIDE = { width: 1060, height: 296, api: [16, 120, 82, 62], doc: [133, 76, 167, 151], exchange: [366, 151, 24],
  trunk: 414, queue: 425, handler: [477, 97], pitch: 66, first: 85, lane: [611, 931], drop: 0, dead: [962, 82], none: "none",
  A: 115, B: 321, C: [402, 151], E: 557, F: 947 };
const NARROW = { width: 332, height: 494, api: [10, 58, 62, 56], doc: [93, 20, 145, 132], exchange: [286, 86, 23],
  trunk: 16, queue: 28, handler: [75, 92], pitch: 96, first: 194, lane: [24, 306], drop: 42, dead: [222, 92],
  none: "no dead letter", A: 82, B: 250, C: [286, 140], E: 40, F: 190 };
const HEADS = [[16, "1 API", "answers at once"], [133, "2 One document, one write", "order and event: both or neither"],
  [341, "3 Exchange", "copies"], [426, "4 A queue per handler", "one waits, the others go on"],
  [611, "5 Tries, in time", "ms to scale, waits cut short"], [1044, "6 Dead letters", "kept for a person", "end"]];

/** What draws into a picture, and remembers the spots where an order can be. */
function penOf(root) {
  const put = (tag, attributes, ...inside) => root.appendChild(svg(tag, attributes, ...inside));
  const spots = {};
  return {
    put, spots,
    spot: (where, x, y) => { spots[where] = [x, y]; },
    text: (x, y, words, look = "") => put("text", { x, y, class: look }, words),
    line: (d, look) => put("path", { d, class: look }),
    box: (x, y, width, height, look = "") => put("rect", { x, y, width, height, rx: 6, class: `box ${look}` }),
    mark: (kind, x, y, size = 16, more = {}) => put("use",
      { href: `#${kind}`, x: x - size / 2, y: y - size / 2, width: size, height: size, class: kind, ...more }),
  };
}

function draw(scene, order, label) {
  const { handlers } = page, at = narrow() ? NARROW : WIDE, wide = at === WIDE;
  const more = Math.max(0, handlers.length - 3) * at.pitch, height = at.height + more, down = wide ? more / 2 : 0;
  const root = svg("svg", { viewBox: `0 0 ${at.width} ${height}`, role: "img", "aria-label": label }), pen = penOf(root);
  const rows = Object.fromEntries(handlers.map(({ name }, i) => [name, at.first + i * at.pitch]));
  const asked = (name) => scene.sent.some((type) => takersOf(type, order).includes(name));
  if (wide) HEADS.forEach(([x, title, sub, end = ""]) => {
    pen.text(x, 24, title, `b ${end}`);
    pen.text(x, 39, sub, `dim ${end}`);
  });
  else pen.text(166, 13, "one document, one write", "dim mid");
  drawStore(pen, at, down, scene, order);
  drawQueues(pen, at, down, height - 20, rows, scene, asked);
  drawTimes(pen, at, height - (wide ? 20 : 40), rows, scene, order, asked);
  drawDead(pen, at, rows, scene);

  const failing = scene.lines.findLast((line) => line.failed || line.parked)?.by;
  const letters = { A: [at.A, at.exchange[1] + down], B: [at.B, at.exchange[1] + down], C: [at.C[0], at.C[1] + down],
    D: [at.handler[0] + at.handler[1], at.first - 17], E: [at.E, height - 20],
    F: [at.F, rows[failing] ?? at.first + at.pitch] };
  for (const [name, [x, y]] of Object.entries(letters)) {
    pen.put("g", { class: `letter ${name === (page.letter ?? scene.letter) ? "on" : ""}`, "data-letter": name },
      svg("circle", { cx: x, cy: y, r: 8.5 }), svg("text", { x, y: y + 4 }, name));
  }
  for (const [where, name] of scene.tokens) {
    const [x, y] = pen.spots[name ? `${where} ${name}` : where] ?? pen.spots[`queue ${name}`] ?? pen.spots.order;
    pen.put("circle", { cx: x, cy: y, r: 14, class: "ring" });
    pen.mark("token", x, y, 20);
  }
  return root;
}

/** 1 the API, 2 the document with its outbox, 3 the exchange. */
function drawStore({ line, text, box, mark, put, spot }, { api, doc, exchange }, down, scene, order) {
  const [ax, ay, aw, ah] = api, [x, dy, width, height] = doc, [ex, ey, radius] = exchange;
  const y = dy + down, mid = ey + down, fold = y + height * 0.57, stored = Boolean(scene.status);
  const sent = scene.sent.length > 0 || scene.tokens.some(([where]) => where === "exchange");
  for (const [from, to, on] of [[ax + aw, x, stored], [x + width, ex - radius, sent]]) {
    line(`M${from},${mid}H${to - 1}`, on ? "way" : "open");
    line(`M${to - 8},${mid - 5}l8,5l-8,5z`, `arrow ${on ? "on" : ""}`);
  }
  box(ax, ay + down, aw, ah, scene.code && scene.code !== 201 ? "stop" : "");
  ["POST", "/orders", scene.code ?? ""].forEach((words, i) =>
    text(ax + aw / 2, ay + down + ah / 2 - 10 + i * 16, words, i === 2 ? "mono mid b" : "mono mid"));
  line(`M${x},${y}h${width - 20}l20,20v${height - 20}h${-width}z`, `box ${stored ? "sheet" : "none"}`);
  line(`M${x},${fold}h${width}`, stored ? "link-line" : "open");
  spot("api", ax + aw, ay + down + 4);
  spot("order", x + width - 23, y + 40);
  spot("outbox", x + width - 23, fold + 18);
  spot("exchange", ex + radius - 3, mid - radius + 3);
  if (stored) {
    const outbox = words(scene.outbox), parked = words(scene.parked);
    line(`M${x + width - 20},${y}v20h20`, "box sheet");
    text(x + 13, y + 22, `order ${order.id.slice(-6)}`, "mono");
    mark(scene.status, x + 21, y + 39);
    text(x + 36, y + 44, scene.status, "big");
    text(x + 13, y + 67, short(parked ? `parked: ${parked}` : `${goods(order)}, ${money(order)}`, 22), parked ? "b bad" : "dim");
    text(x + 13, fold + 21, "outbox", "mono");
    text(x + 13, fold + 41, outbox ? short(outbox, 20) : "empty, all sent", outbox ? "mono" : "dim");
  } else {
    text(x + width / 2, y + height * 0.34, scene.code ? "nothing stored" : "the order", "dim mid");
    text(x + width / 2, y + height * 0.8, scene.code ? "" : "its events to send", "dim mid");
  }
  const away = page.ready.broker === "down" && (!order || scene.outbox?.length > 0);
  put("circle", { cx: ex, cy: mid, r: radius, class: `box ${away ? "gone" : ""}` });
  text(ex, mid + 4, away ? "away" : "orders", "mono mid");
}

/** 4 a queue for each handler, and the way back into the document. */
function drawQueues({ line, text, box, spot }, at, down, low, rows, scene, asked) {
  const wide = at === WIDE, [ex, ey, radius] = at.exchange, [x, width] = at.handler, [dx, dy, dw, dh] = at.doc;
  const foot = dx + dw / 2, bottom = dy + down + dh + 2, mid = ey + down;
  const answered = (name) => scene.lines.some((each) => each.by === name && !each.failed && !each.parked);
  for (const on of [false, true]) for (const [name, y] of Object.entries(rows)) { // what was travelled lies above
    const start = wide ? `M${ex + radius},${mid}` : `M${ex},${ey + radius}V${at.first - 30}`;
    const way = `${start}H${at.trunk}V${y}H${at.queue}M${at.queue + 41},${y}H${x}`;
    if (asked(name) === on) line(way, on ? "way" : "open");
    if (wide && answered(name) === on) line(`M${x + width},${y}H590V${low}H${foot}V${bottom}`, on ? "way" : "open");
  }
  if (wide) line(`M${foot - 5},${bottom + 8}l5,-9l5,9z`, `arrow ${Object.keys(rows).some(answered) ? "on" : ""}`);
  text(wide ? foot + 12 : 60, wide ? low - 6 : low + 4, `the answer comes back: again one write`, "dim");
  for (const { name, waiting, seen } of page.handlers) {
    const y = rows[name], gone = seen && now() - Date.parse(seen) > 15000;
    box(at.queue, y - 13, 41, 27);
    line(`M${at.queue + 14},${y - 13}v27m13,0v-27`, "box");
    text(at.queue + 20, y + 27, waiting > 0 ? `${waiting} wait` : "", "dim mid");
    box(x, y - 18, width, 37, gone ? "gone" : asked(name) ? "on" : "");
    text(x + width / 2, y + (gone ? -1 : 5), short(name, 13), "name mid");
    text(x + width / 2, y + 13, gone ? "no consumer" : "", "bad mid");
    spot(`queue ${name}`, at.queue + 20, y);
    spot(`handler ${name}`, x + width - 4, y - 14);
  }
}

/** 6 what was parked. */
function drawDead({ line, text, box, spot }, at, rows, scene) {
  const [x, width] = at.dead, from = at === WIDE ? at.lane[1] : at.handler[0] + at.handler[1];
  for (const { name, dead = 0 } of page.handlers) {
    const y = rows[name], mine = scene.tokens.some(([where, who]) => where === "dead" && who === name);
    const count = Math.max(dead, mine ? 1 : 0);
    line(`M${from},${y}H${x}`, mine ? "way" : "open");
    box(x, y - 15, width, 31, mine ? "dead" : "none");
    text(x + width / 2 + (mine ? 10 : 0), y + 4, count ? `${count} here` : at.none, `mid ${count ? "b" : "dim"}`);
    spot(`dead ${name}`, x + 17, y);
  }
}

/** 5 each try as a bar from the moment it was due until it was recorded, each wait as a block cut short. */
function drawTimes(pen, at, low, rows, scene, order, asked) {
  const [left, right] = at.lane, { line, text } = pen;
  const { bars, waits } = order ? piecesOf(order) : { bars: [], waits: [] };
  const trouble = order && troubleOf(order), live = scene.lines.length === order?.timeline.length;
  const planned = trouble?.kind === "retrying" ? page.delays.slice(trouble.line.try) : [];
  const axis = axisOf(bars, waits, right - left - 50, planned), place = (time) => left + axis.place(time);
  for (const [name, row] of Object.entries(rows)) {
    const y = row + at.drop, mine = bars.filter((bar) => bar.by === name && bar.step < scene.lines.length);
    line(`M${left},${y}H${right}`, "lane");
    if (order && !mine.length) text(left + 2, y + 4, asked(name) ? "in the queue" : "not asked yet", "dim halo");
    for (const { from, to, kind, step, first, cause } of mine) {
      const announcer = scene.lines.find((each) => each.event === cause)?.by, x = place(from);
      if (first && rows[announcer] && announcer !== name) line(`M${x},${rows[announcer] + at.drop + 9}V${y}`, "link-line");
      pen.put("rect", { x, y: y - 9, width: Math.max(1, place(to) - x), height: 18, rx: 2, class: `bar ${kind}`, "data-step": step });
    }
    for (const wait of waits.filter((each) => mine.some(({ step }) => step === each.step))) drawWait(pen, wait, place, y, name);
    if (live && trouble?.line?.by === name) planned.forEach((seconds, i) => {
      const x = left + axis.after(i), until = left + axis.after(i + 1);
      for (const each of i + 1 < planned.length ? [x] : [x, until]) pen.mark("planned", each, y);
      line(`M${x + 9},${y - 9}H${until - 9}v18H${x + 9}z`, "plan");
      text((x + until) / 2, y + 4, span(seconds * 1000), "dim mid halo");
    });
    let edge = -Infinity; // to the left of it there is text already
    mine.forEach(({ from, to, kind, step, label, tries }, i) => {
      const x = place(from), end = place(to), limit = mine[i + 1] ? place(mine[i + 1].from) : right + (label === "done" ? 30 : 5);
      pen.mark(kind, end, y, 16, { "data-step": step });
      const below = tries ? end - 12 : x + 2, words = tries ? `try ${tries}` : span(to - from);
      if (below > edge) text(below, y + 25, words, "dim");
      if (below > edge) edge = below + 7.5 * words.length;
      const beside = end + 14 + 7.3 * label.length < limit;
      text(beside ? end + 14 : Math.min(x + 2, right - 7.3 * label.length), beside ? y + 4 : y - 14, label, "mono halo");
    });
  }
  if (!order) return;
  text(left, low + 4, "0", "mono dim");
  if (axis.tick.x > 45) text(left + axis.tick.x, low + 4, span(axis.tick.ms), "mono dim mid");
}

function drawWait({ put, text, spot }, { from, to }, place, y, name) {
  const x = place(from), width = place(to) - x, seconds = Math.ceil((to - now()) / 1000);
  for (const look of ["bar retrying", "hatch"]) put("rect", { x, y: y - 9, width, height: 18, class: look });
  text(x + width / 2, seconds > 0 ? y - 14 : y + 4, seconds > 0 ? `next try in ${seconds} s` : span(to - from), "b mid halo");
  spot(`wait ${name}`, x + width / 2, y);
}

/** The bars and the waits of an order's timeline, in milliseconds since 1970. */
function piecesOf(order) {
  const announced = {}, due = {}, waits = [], start = Date.parse(order.createdAt);
  const bars = order.timeline.flatMap((line, step) => {
    const cause = causeOf(line), to = Date.parse(line.at), key = `${line.by}/${cause}`, first = !(key in due);
    if (line.event) announced[line.event] = to;
    if (!cause) return [];
    const from = Math.min(to, due[key] ?? announced[cause] ?? start);
    if (line.next) waits.push({ step, from: to, to: (due[key] = Math.max(to, Date.parse(line.next))) });
    const label = line.event ?? (line.lost ? "too late" : line.done ? "done" : "");
    return [{ by: line.by, step, from, to, first, cause, kind: kindOf(line), label, tries: label ? 0 : line.try }];
  });
  return { bars: [{ by: "api", from: start, to: start }, ...bars], waits };
}

/** Where a time stands: to scale within a burst; what is longer than AT_ONCE is a little longer per doubling. */
function axisOf(bars, waits, room, planned) {
  const stops = [...new Set([...bars, ...waits].flatMap(({ from, to }) => [from, to]))].sort((a, b) => a - b);
  const gaps = stops.slice(1).map((stop, i) => stop - stops[i]), sum = (list) => list.reduce((a, b) => a + b, 0);
  const cut = (ms) => 40 + 8 * Math.log2(Math.max(1, ms / 1000));
  const cuts = sum(gaps.filter((gap) => gap > AT_ONCE).map(cut)) + sum(planned.map((seconds) => cut(seconds * 1000)));
  const shrink = Math.min(1, (room * 0.8) / (cuts || 1)), burst = sum(gaps.filter((gap) => gap <= AT_ONCE));
  const perMs = Math.min(18, (room - cuts * shrink) / (burst || 1));
  const widths = gaps.map((gap) => (gap > AT_ONCE ? cut(gap) * shrink : gap * perMs));
  const place = (stop) => sum(widths.slice(0, stops.indexOf(stop)));
  const after = (n) => sum(widths) + sum(planned.slice(0, n).map((seconds) => cut(seconds * 1000) * shrink));
  const pause = gaps.findIndex((gap) => gap > AT_ONCE), last = stops[pause < 0 ? stops.length - 1 : pause];
  return { place, after, tick: { x: place(last), ms: last - stops[0] } };
}

// --- showing it all

function render() {
  const { order, orders, ready, down, refused } = page;
  const moments = order && !refused ? momentsOf(order) : [];
  if (page.moment >= moments.length) Object.assign(page, { moment: null, playing: false });
  const moment = page.moment === null ? null : moments[page.moment], scene = sceneOf(order, moment);
  const { kind, title, text, timer = "" } = storyOf(order, moment, moments);

  fill($("headline"), [[kind], title], (item) => (item[0] === kind ? icon(kind) : html("span", {}, title)));
  $("text").setAttribute("aria-live", page.playing ? "off" : "polite");
  if ($("text").textContent !== (page.notice || text)) $("text").textContent = page.notice || text;
  $("timer").textContent = timer;
  $("cancel").hidden = order?.status !== "pending" || Boolean(refused || moment);
  $("redrive").hidden = !order?.parked || Boolean(refused || moment);
  for (const [id, off] of [["back", page.moment === 0], ["on", !moment], ["replay", false]]) {
    $(id).setAttribute("aria-disabled", !moments.length || off);
  }
  $("replay").textContent = page.playing ? "Pause" : "Replay slowly";

  const state = (name, up) => [up ? "done" : "parked", `${name} ${up ? "up" : name === "broker" ? "away" : "down"}`];
  const health = down ? [state("API", false)] : [state("API", true), state("store", ready.store !== "down"), state("broker", ready.broker !== "down")];
  fill($("health"), health, ([look, words]) => html("li", {}, icon(look), ` ${words}`));
  $("key").hidden = !page.denied;

  fill($("orders"), orders.length ? orders.slice(0, 10).map(rowOf) : [null], orderRow);
  fill($("stock"), page.stock.map(({ sku, available }) => [sku, page.editing === sku ? null : available]), stockChip);

  const latest = scene.lines.findLastIndex((each) => each.id || (moment || troubleOf(order) ? each === scene.lines.at(-1) : false));
  const chosen = Math.min(page.step ?? latest, scene.lines.length - 1), line = scene.lines[chosen];
  const shown = scene.lines.map((each, i) => [each, i, i === chosen && !page.whole, order.createdAt]);
  fill($("steps"), shown.length ? shown : [null], stepRow);
  showJson(order, line);
  fill($("letters"), Object.keys(CRASHES).map((name) => [name, name === (page.letter ?? scene.letter)]), ([name, on]) =>
    html("button", { type: "button", "data-key": name, "data-letter": name, "aria-pressed": on, "aria-label": `${name}: ${CRASHES[name][0]}` }, name));
  fill($("crash"), [page.letter ?? scene.letter], crashText);
  const seconds = Math.floor(now() / 1000); // a picture that counts down is drawn each second
  fill($("picture"), [[scene, page.letter, narrow(), order?.id, order?.timeline.length, ready.broker,
    page.handlers, scene.tokens.some(([where]) => where === "wait") && seconds]], () => draw(scene, order, `An order's way, from API to dead letters. ${title}`));
  for (const node of document.querySelectorAll("[data-at]")) node.textContent = span(Math.max(1000, now() - Date.parse(node.dataset.at))).replace(/\.\d/, "");
}

function rowOf(order) {
  const trouble = troubleOf(order)?.kind, { id, status, createdAt, customerId } = order;
  const word = [status === "pending" ? trouble ?? status : status, status !== "pending" && trouble].filter(Boolean).join(", ");
  return [id, word.split(", ")[0], goods(order), customerId, word, createdAt, id === page.chosen];
}

function orderRow(row) {
  if (!row) return html("li", { class: "dim" }, "None yet.");
  const [id, kind, what, who, word, at, chosen] = row;
  return html("li", {}, html("button", { type: "button", "data-key": id, "aria-current": chosen, click: () => choose(id) },
    icon(kind), html("span", { class: "who" }, what, " ", html("small", { class: "dim" }, who)),
    html("small", { class: word === "processed" ? "hidden" : "" }, word), html("small", { class: "age", "data-at": at })));
}

function stepRow(item) {
  if (!item) return html("li", { class: "dim" }, page.refused ? "None: the order does not exist." : "None yet.");
  const [line, step, chosen, start] = item, { by, event, error, sent, lost } = line;
  const what = event ?? (error ? `try ${line.try}, ${error}` : sent ? `sent ${sent}` : lost ? "too late" : "done");
  return html("li", {}, html("button", { type: "button", "data-key": step, "data-step": step, "aria-pressed": chosen }, icon(kindOf(line)), html("b", {}, by),
    html("span", { class: event ? "mono" : "" }, what), html("span", { class: "mono dim" }, span(Date.parse(line.at) - Date.parse(start)))));
}

function showJson(order, line) {
  const event = line?.id && page.events.find((each) => each.id === line.id), { refused } = page;
  const curl = [`curl ${new URL("orders", document.baseURI)} \\`, ` -H "Authorization: Bearer ${page.key === "demo-key" ? page.key : "$KEY"}" \\`,
    ' -H "Content-Type: application/json" \\', ` -d '{"customerId": "ada", "items": [{"sku": "A1", "quantity": 2, "price": 19.99}]}'`];
  const [title, value] = refused ? [`The answer, ${refused.status}`, refused] : !order || !line ? ["The same from a terminal"]
    : page.whole ? ["The order", order] : event ? [`The event ${event.type}`, event] : ["The line in the order's timeline", line];
  $("json-title").textContent = title;
  $("whole").hidden = !value || Boolean(refused);
  $("whole").setAttribute("aria-pressed", page.whole);
  fill($("json"), value ? jsonLines(value) : curl.map((text) => ({ key: "", text })), ({ key, text }) =>
    html("div", {}, html("span", { class: "dim" }, key), text));
}

function crashText(name) {
  const [title, saved, without, file, function_] = CRASHES[name];
  return html("div", {}, html("p", {}, html("b", {}, `${name}: ${title}. `), saved), html("p", {}, html("b", {}, "Without it: "), without),
    html("p", {}, html("b", {}, "Read "), html("code", {}, `${file} ${function_}`)));
}

function stockChip([sku, available], i) {
  if (available !== null) return html("li", {}, html("button", { type: "button", "data-key": sku, "aria-label": `${sku}: ${available}, press to set`,
    click: () => { page.editing = sku; render(); $("stock").querySelector("input").focus(); } }, html("b", {}, sku), ` ${available}`));
  const leave = () => { page.editing = null; render(); $("stock").querySelector(`[data-key="${sku}"]`)?.focus(); };
  const save = async (field) => {
    const { status, data } = await api(`stock/${sku}`, "PUT", JSON.stringify({ available: Number(field.value) }));
    if (status < 300) page.stock[i] = data;
    else page.notice = data.errors?.[0].message ?? data.detail;
    leave();
  };
  return html("li", {}, html("input", { type: "number", min: 0, value: page.stock[i].available, "aria-label": `${sku}, Enter sets it, Escape leaves it`,
    keydown: (event) => (event.key === "Enter" ? save(event.target) : event.key === "Escape" && leave()) }));
}

// --- what a person does

function step(by) {
  const count = page.order && !page.refused ? momentsOf(page.order).length : 0;
  if (!count || (page.moment === null && by > 0)) return;
  Object.assign(page, { playing: false, step: null, letter: null, moment: Math.max(0, (page.moment ?? count - 1) + by) });
  render();
}

function play() {
  if (!page.order || page.refused) return;
  Object.assign(page, { playing: !page.playing, step: null, letter: null, moment: page.moment ?? 0 });
  render();
}

async function sendExample(name) {
  const body = { customerId: CUSTOMERS[page.placed++ % CUSTOMERS.length], ...EXAMPLES[name] };
  const { status, data } = await place(JSON.stringify(body));
  if (status !== 201) Object.assign(page, { refused: data, chosen: null, order: null, moment: null, playing: false, letter: null, notice: "" });
  render();
  $("headline").focus();
}

async function sendOwn() {
  const { status, data } = await place($("body").value);
  if (status === 201) return $("dialog").close();
  const faults = data.errors ?? [{ pointer: "", message: data.detail ?? data.title }];
  const lines = data.errors ? jsonLines(JSON.parse($("body").value)) : []; // written line by line, so that a fault has a line
  if (lines.length) $("body").value = lines.map(({ key, text }) => key + text).join("\n");
  fill($("faults"), faults, ({ pointer, message }) => {
    let at = -1, place = pointer; // where the field is missing, the line of what should have it
    while (lines.length && (at = lines.findIndex((each) => each.pointer === place)) < 0) place = place.replace(/\/[^/]*$/, "");
    const start = lines.slice(0, at).reduce((sum, { key, text }) => sum + key.length + text.length + 1, 0);
    const select = () => { $("body").focus(); if (at >= 0) $("body").setSelectionRange(start, start + lines[at].key.length + lines[at].text.length); };
    return html("li", {}, html("button", { type: "button", click: select }, `${at >= 0 ? `Line ${at + 1}, ` : ""}${pointer} ${message}`));
  });
}

function clicked({ target }) {
  const on = target.closest("[data-step], [data-letter], [data-example]")?.dataset ?? {};
  if (on.step) Object.assign(page, { step: Number(on.step), whole: false });
  if (on.letter) page.letter = on.letter;
  if (on.example) sendExample(on.example);
  render();
}

function pressed(event) {
  if (event.key === "Escape" && !$("dialog").open) Object.assign(page, { step: null, letter: null, whole: false });
  else if (["ArrowLeft", "ArrowRight"].includes(event.key) && $("tools").contains(event.target)) step(event.key === "ArrowLeft" ? -1 : 1);
  else return;
  render();
}

function theme(dark) {
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "Light" : "Dark";
}

function start() {
  const { key, order } = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (key) sessionStorage.setItem("key", (page.key = key));
  page.chosen = order ?? null;
  history.replaceState(null, "", order ? `#order=${order}` : location.pathname);
  let dark = matchMedia("(prefers-color-scheme: dark)").matches;
  theme(dark);
  fill($("legend"), Object.entries(LEGEND), ([kind, words]) => html("li", {}, icon(kind), ` ${words}`));
  $("body").value = JSON.stringify({ customerId: "ada", email: "ada@example.com", ...EXAMPLES.good,
    shippingAddress: { ...ADDRESS, city: "Berlin" } }, null, 1);
  const on = { theme: () => theme((dark = !dark)), own: () => $("dialog").showModal(), close: () => $("dialog").close(), send: sendOwn,
    cancel: () => act("cancel"), redrive: () => act("redrive"), back: () => step(-1), on: () => step(1), replay: play,
    whole: () => { page.whole = !page.whole; render(); } };
  for (const [id, job] of Object.entries(on)) $(id).addEventListener("click", job);
  $("key").addEventListener("change", ({ target }) => {
    sessionStorage.setItem("key", (page.key = target.value));
    Object.assign(page, { denied: false });
  });
  document.addEventListener("click", clicked);
  document.addEventListener("keydown", pressed);
  setInterval(() => page.playing && (page.moment++, render()), MOMENT);
  setInterval(render, 1000);
  keep(lookAtHealth, true);
  keep(lookAtOrder);
  keep(lookAtHandlers);
  keep(async () => { page.orders = (await get("orders?limit=12")).orders; return 1000; });
  keep(async () => { page.stock = (await get("stock?limit=100")).stock; return 5000; });
  render();
}

start();
