"use strict";
// The live page: one more client of the public API. It asks for what is true, and draws it.
// What was too fast to see it shows again in moments, and says so; what waits it counts down.

const ADDRESS = { name: "Ada Lovelace", line1: "1 Engine Row", city: "Berlin", postalCode: "10115", country: "DE" };
const EXAMPLES = {
  good: { items: [{ sku: "A1", quantity: 2, price: 19.99 }] },
  out: { items: [{ sku: "E5", quantity: 1, price: 120 }] },
  bad: { items: [{ sku: "A1", quantity: 1, price: 9.999 }] },
  jam: { items: [{ sku: "B2", quantity: 1, price: 5 }], shippingAddress: { ...ADDRESS, city: "Jam" } },
  dead: { items: [{ sku: "C3", quantity: 1, price: 3 }], shippingAddress: { ...ADDRESS, city: "Jam!" } },
};
const CUSTOMER = { customerId: "ada", email: "ada@example.com" };
const CUSTOMERS = ["ada", "grace", "joan", "mary", "lin", "eve"];
const STANDARD = ["inventory", "shipping", "email"].map((name) => ({ name, takes: [] })); // before a consumer reported
const FLOW = ["order_created", "inventory_reserved", "?", "order_confirmed", "order_failed", "order_cancelled"];
const STATUS = { order_created: "pending", order_confirmed: "processed", order_failed: "failed",
  order_cancelled: "cancelled" };
const LEGEND = { done: "done", pending: "pending", retrying: "a try failed, another comes",
  planned: "a try to come", parked: "parked: needs a person", failed: "failed: a proper end", cancelled: "cancelled",
  refused: "refused, never stored", token: "the order is here" };
const CRASHES = { // what went wrong, what saves the order, what would be without it, what to read
  A: ["before the write", "No answer comes, so the client asks again with the same Idempotency-Key: one order, however"
    + " often.", "two orders for one click.", "core/store/orders.py", "Orders.create"],
  B: ["stored, not yet sent", "The event was saved in the same write as the order, so it is still in the outbox. The"
    + " sweep finds it and sends it.", "the order is pending for ever, and nobody was told.",
    "core/flow/sweep.py", "Sweep._look"],
  C: ["sent, outbox not cleared", "It is sent again. The handler finds its step already recorded and only acks.",
    "two labels and two mails for one order.", "core/order/state_machine.py", "outcome_of"],
  D: ["worked, nothing recorded", "No ack, so it is delivered again. Stock that was taken was a pending move, which the"
    + " sweep rolls back; a label or a mail is asked for under the same token, and made once.",
    "a unit is gone that nobody bought.", "core/flow/sweep.py", "Sweep._end_moves"],
  E: ["recorded, not acked", "It is delivered again. The step is there, so it is acked without work.",
    "the whole step runs twice.", "consumer.py", "Worker.run_step"],
  F: ["copied on, not acked", "The copy is confirmed before the ack, so the message may come twice, never not at all.",
    "the failing message vanishes and nobody notices.", "core/bus/rabbit.py", "RabbitDelivery._forward"],
};
const MOMENT = 600, AT_ONCE = 400; // ms a moment is shown; ms without news that are still drawn to scale

const FRESH = { chosen: null, order: null, events: [], refused: null, notice: "", // of the order that is looked at
  moment: null, playing: false, step: null, letter: null, whole: false };
const page = { ...FRESH, placed: 0, // all that is drawn follows from this
  key: sessionStorage.getItem("key") || "", denied: false, down: false, looksAgain: 0, offset: 0,
  orders: [], handlers: STANDARD, delays: [], stock: [], ready: {} };

// --- small tools

const $ = (id) => document.getElementById(id);
const now = () => Date.now() + page.offset;
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const causeOf = (line) => line.of ?? line.done ?? line.failed ?? line.parked ?? line.lost; // the event a step took
const sum = (list) => list.reduce((a, b) => a + b, 0);
const short = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
const goods = ({ items: [first, ...more] }) => `${first.quantity} × ${first.sku}${more.length ? ", …" : ""}`;
const silent = ({ seen }) => seen && now() - Date.parse(seen) > 15000; // a consumer reports every 5 s
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
  if (status === 404) page.chosen = null; // only an order can be missing
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
    if (always) page.looksAgain = now() + wait;
    render();
  }
}

async function lookAtOrder() {
  const id = page.chosen;
  if (!id) return 300;
  const order = await get(`orders/${id}`);
  const known = page.events.length && order.timeline.length === page.order?.timeline.length;
  const events = known ? page.events : (await get(`orders/${id}/events`)).events;
  if (page.chosen === id) Object.assign(page, { order, events });
  return order.status === "pending" || troubleOf(order) || order.outbox || unfinished(order).length ? 300 : 5000;
}

async function lookAtHandlers() {
  const { handlers, retryDelays } = await get("handlers");
  const turn = ({ takes }) => Math.min(...takes.map((type) => FLOW.indexOf(FLOW.includes(type) ? type : "?")));
  handlers.sort((a, b) => turn(a) - turn(b));
  Object.assign(page, { handlers: handlers.length ? handlers : STANDARD, delays: retryDelays });
  return 2000;
}

async function lookAtOrders() {
  page.orders = (await get("orders?limit=12")).orders;
  return 1000;
}

async function lookAtStock() {
  page.stock = (await get("stock?limit=100")).stock;
  return 5000;
}

async function lookAtHealth() {
  page.ready = (await api("readyz")).data;
  page.down = false;
  return 3000;
}

/** Place an order; where no answer comes, or a 503, again under the same key: so it is one order, however often. */
async function place(body, key = [...crypto.getRandomValues(new Uint8Array(16))].join("")) {
  const ask = () => api("orders", "POST", body, { "Idempotency-Key": key }).catch(render);
  let answer = await ask();
  for (; !answer || answer.status === 503; answer = await ask()) await sleep(2000);
  if (answer.status === 201) {
    choose(answer.data.id, answer.data);
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) Object.assign(page, { moment: 0, playing: true });
  }
  return answer;
}

function choose(id, order = page.orders.find((each) => each.id === id)) {
  Object.assign(page, FRESH, { chosen: id, order });
  history.replaceState(null, "", `#order=${id}`);
  lookAtOrder().then(render, render);
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

/** [handler, event type, its newest line] of each step still asked for; none where its taker was told it is over. */
function unfinished(order) {
  const { timeline, parked = [] } = order, announced = timeline.map((line) => line.event).filter(Boolean);
  const over = announced.find((type) => ["order_failed", "order_cancelled"].includes(type));
  const told = over ? takersOf(over, order) : [];
  const steps = announced.flatMap((type) => takersOf(type, order).map((name) => {
    const lines = timeline.filter((line) => line.by === name && causeOf(line) === type);
    const settled = parked.includes(name) || (told.includes(name) && over !== type);
    return !settled && lines.every((line) => line.failed || line.parked) && [name, type, lines.at(-1)];
  }));
  return steps.filter(Boolean);
}

/** The line of the step that is parked, or that waits for its next try; undefined where all is well. */
function troubleOf(order) {
  const parked = order.timeline.findLast((line) => line.parked && order.parked?.includes(line.by));
  return parked ?? unfinished(order).map(([, , line]) => line).find((line) => line?.failed);
}

/** What happened, moment by moment: how many lines of the timeline, what was sent, where the order was. */
function momentsOf(order) {
  const sent = [], moments = [];
  const add = (name, lines, tokens, letter, say, outbox = []) =>
    moments.push({ name, lines, tokens, letter, say, outbox, sent: [...sent] });
  add("a request", 0, [["api"]], "A", "The client sends POST /orders. Nothing is stored yet.");
  order.timeline.forEach((line, lines) => {
    const cause = causeOf(line);
    if (cause && !sent.includes(cause)) {
      const names = takersOf(cause, order), all = words(names), at = (where) => names.map((name) => [where, name]);
      add("sent to the exchange", lines, [["exchange"]], "C",
        `${cause} goes to the broker, and leaves the outbox once the broker has confirmed it.`, [cause]);
      sent.push(cause);
      add(`in ${names.length > 1 ? `${names.length} queues` : `${all}'s queue`}`, lines, at("queue"), "C",
        `The exchange copies ${cause} into the queue of each handler that takes it: ${all}.`);
      add(`${all} at work`, lines, at("handler"), "D",
        "Until the work is done nothing is recorded and the message is not acked: it would come again.");
    }
    const [name, token, letter, say] = wordsOf(line, cause);
    add(name, lines + 1, [token], letter, say, line.event ? [line.event] : []);
  });
  return moments;
}

/** What to call a line of the timeline, where the order was then, the crash point to think of, and what to say. */
function wordsOf({ by, event, error, failed, parked, sent, lost, try: tries }, cause) {
  if (event === "order_created") return ["one write", ["outbox"], "B",
    "The order and the event it owes are one document, so one write keeps both or neither. Now the API answers 201."];
  if (event && by === "api") return ["one write", ["outbox"], "B", `The new status and ${event}: both or neither.`];
  if (event) return ["one write", ["outbox"], "E", `${by} is done. Its step and the next event, ${event}, go into the`
    + ` order together: a crash keeps both or neither. Then the message is acked.${STATUS[event] ? ` The order is`
    + ` ${STATUS[event]} from here on.` : ""}`];
  if (failed) return [`try ${tries} failed`, ["wait", by], "F", `${error}. A copy of ${cause} waits in ${by}'s retry`
    + " queue. No other order waits for it, and what is done does not run again."];
  if (parked) return ["parked", ["dead", by], "F", `${error}, and that was the last try. The message is kept in ${by}'s`
    + " dead-letter queue until a person decides."];
  if (sent) return ["sent again", ["exchange"], "B", `The sweep sent ${sent} again: no message would have come.`];
  if (lost) return ["too late", ["order"], "E", `The order had moved on meanwhile, so what ${by} did is undone.`];
  return ["one write", ["order"], "E", `${by} is done, and that is recorded. It announces nothing.`];
}

/** What is drawn: a moment of the replay, or how it is now. */
function sceneOf(order, moment) {
  const nothing = { lines: [], sent: [], parked: [], outbox: [], tokens: [] };
  if (page.refused) return { ...nothing, code: page.refused.status, tokens: [["api"]], letter: "A" };
  if (!order) return { ...nothing, letter: "B" };
  const { timeline, outbox = [], parked = [] } = order;
  if (moment) {
    const lines = timeline.slice(0, moment.lines), status = STATUS[lines.findLast((line) => STATUS[line.event])?.event];
    return { ...nothing, ...moment, lines, status, code: status && 201 };
  }
  const sent = timeline.map((line) => line.event).filter((type) => type && !outbox.includes(type));
  const tokens = [...parked.map((name) => ["dead", name]), ...unfinished(order).map(([name, , line]) =>
    [line?.failed && Date.parse(line.next) > now() ? "wait" : "queue", name])];
  const letter = troubleOf(order) ? "F" : sent.some((type) => takersOf(type, order).length > 1) ? "C" : "B";
  return { code: 201, lines: timeline, sent, outbox, parked, status: order.status, letter,
    tokens: outbox.length ? [["outbox"]] : tokens.length ? tokens : [["order"]] };
}

/** [icon, headline, paragraph, countdown] */
function storyOf(order, moment, moments) {
  const left = (time) => `in ${Math.max(0, Math.ceil((time - now()) / 1000))} s`;
  if (page.denied) return ["refused", page.key ? "This key is not known" : "Which key?",
    "Paste an API key into the field above. make run prints a link that brings it along."];
  if (page.down) return ["refused", "The API does not answer", "What was answered 201 is stored.",
    `Trying again ${left(page.looksAgain)}.`];
  if (page.refused) return refusal(page.refused);
  if (!order) return ["token",
    page.chosen ? "One moment" : page.orders.length ? "Choose an order, or place one" : "No order yet",
    "Press Good order. Its way is drawn here as it goes: stored, announced, queued, handled, answered, and what happens"
    + " when a step fails."];
  const whole = order.status === "pending" ? "" : ` of ${moments.length}`; // else more is to come
  if (moment) return ["pending", `Replay, moment ${page.moment + 1}${whole}: ${moment.name}`,
    moment.say + (page.moment ? "" : ` This is a replay, ${paceOf(order, moments)}.`)];

  const { status, timeline, outbox, createdAt } = order, last = timeline.at(-1), trouble = troubleOf(order);
  const but = status === "pending" ? "" : `${status[0].toUpperCase()}${status.slice(1)}, but `;
  const [name, type = last.event] = unfinished(order)[0] ?? [];
  if (trouble?.parked) return ["parked", `${but || "Parked: "}${trouble.by} failed ${times(trouble.try)}`,
    `Nothing is lost: the message lies in ${trouble.by}'s dead-letter queue, and the order knows it. Mend the handler,`
    + ` then press Redrive (on a terminal: python consumer.py redrive ${trouble.by}).`];
  if (trouble) return ["retrying", `${but || "Retrying: "}${trouble.by} failed ${times(trouble.try)}`,
    `${trouble.error}${trouble.where ? ` at ${trouble.where}` : ""}. What is done does not run again, and no other`
    + " order waits for this one.",
    `Try ${trouble.try + 1} of ${page.delays.length + 1} is due ${left(Date.parse(trouble.next))}.`];
  if (outbox && page.ready.broker === "down") return ["pending", `${but || "Accepted, and "}safe without the broker`,
    "The API answered 201 although the broker is away. The event waits in the outbox, on disk with the order, and goes"
    + " out when the broker is back."];
  if ((name || !but) && now() - Date.parse(last.at) > 5000) return ["pending",
    `${but || "Waiting: "}nobody takes ${name ? `${name}'s` : "its"} queue`,
    `${type} waits, and nothing is lost meanwhile. Is a consumer running? (python consumer.py)`];
  if (!but) return ["pending", "Under way",
    name ? `${name} has been asked: ${type} is in its queue.` : `${last.by} has announced ${last.event}.`];
  const took = (time) => span(Date.parse(time) - Date.parse(createdAt));
  if (status === "processed") return [status, `Processed in ${took(last.at)}`,
    "No handler calls another. Each writes its step and the next event into the order, in one write; the broker carries"
    + " the event on."];
  const over = `order_${status}`, told = words(takersOf(over, order));
  const undone = `${over} went to ${told} at once: each undoes what it did, if it did any, or tells the customer.`;
  if (status === "cancelled") return [status, `Cancelled after ${took(order.updatedAt)}`, `The event ${undone}`];
  const failer = timeline.find((line) => line.event === "order_failed")?.by;
  return [status, `Failed: ${order.failureReason?.replaceAll("_", " ")}`,
    `Not an error but an answer, given by ${failer} for ${goods(order)}. The event ${undone}`];
}

function refusal({ status, title, detail, errors = [] }) {
  const faults = errors.map(({ pointer, message }) => `${pointer} ${message}. `), n = faults.length;
  const what = n ? `${n === 1 ? "one fault" : `${n} faults`} in the body` : `${status} ${title}`;
  return ["refused", `Refused: ${what}`,
    `${n ? faults.join("") : `${detail}. `}Nothing was stored, so nothing was sent.`];
}

function paceOf({ timeline }, moments) {
  const gaps = timeline.slice(1).map((line, i) => Date.parse(line.at) - Date.parse(timeline[i].at));
  const slower = (moments.length * MOMENT) / (sum(gaps.filter((gap) => gap <= AT_ONCE)) || 1);
  return slower > 2 ? `about ${Number(slower.toPrecision(1))} times slower than it was` : "without its waits";
}

// --- the picture: the map on the left, and each handler's row runs on in time to the right (below it, where narrow)

const WIDE = { width: 1060, height: 296, api: [16, 120, 82, 62], doc: [133, 76, 167, 151], exchange: [366, 151, 24],
  trunk: 414, queue: 425, handler: [477, 97], pitch: 66, first: 85, lane: [611, 931], drop: 0, dead: [962, 82],
  none: "none", A: 115, B: 321, C: [402, 151], E: 557, F: 947 };
const NARROW = { width: 332, height: 512, api: [10, 58, 62, 56], doc: [93, 20, 145, 132], exchange: [286, 86, 23],
  trunk: 16, queue: 28, handler: [75, 92], pitch: 96, first: 194, lane: [24, 306], drop: 44, dead: [222, 92],
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

function draw(scene, order, chosen, label) {
  const { handlers } = page, at = narrow() ? NARROW : WIDE, wide = at === WIDE;
  const more = Math.max(0, handlers.length - 3) * at.pitch, height = at.height + more, down = wide ? more / 2 : 0;
  const root = svg("svg", { viewBox: `0 0 ${at.width} ${height}`, role: "img", "aria-label": label });
  const pen = penOf(root);
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
  const working = scene.tokens.find(([where]) => where === "handler")?.[1];
  const letters = { A: [at.A, at.exchange[1] + down], B: [at.B, at.exchange[1] + down], C: [at.C[0], at.C[1] + down],
    D: [at.handler[0] + at.handler[1], (rows[working] ?? at.first) - 17], E: [at.E, height - 20],
    F: [at.F, rows[failing] ?? at.first + at.pitch] };
  for (const [name, [x, y]] of Object.entries(letters)) {
    pen.put("g", { class: `letter ${name === chosen ? "on" : ""}`, "data-letter": name },
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
  spot("order", x + width - (width > 150 ? 23 : 8), y + 40);
  spot("outbox", x + width - 23, fold + 18);
  spot("exchange", ex + radius - 3, mid - radius + 3);
  const outbox = words(scene.outbox), parked = words(scene.parked);
  if (stored) {
    line(`M${x + width - 20},${y}v20h20`, "box sheet");
    text(x + 13, y + 22, `order ${order.id.slice(-6)}`, "mono");
    mark(scene.status, x + 21, y + 39);
    text(x + 36, y + 44, scene.status, "big");
    const what = parked ? `parked: ${parked}` : `${goods(order)}, ${order.total} ${order.currency}`;
    text(x + 13, y + 67, short(what, 22), parked ? "b bad" : "dim");
    text(x + 13, fold + 21, "outbox", "mono");
    text(x + 13, fold + 41, outbox ? short(outbox, 20) : "empty, all sent", outbox ? "mono" : "dim");
  } else {
    text(x + width / 2, y + height * 0.34, scene.code ? "nothing stored" : "the order", "dim mid");
    text(x + width / 2, y + height * 0.8, scene.code ? "" : "its events to send", "dim mid");
  }
  const away = page.ready.broker === "down" && (!order || outbox);
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
  text(wide ? foot + 12 : 60, wide ? low - 6 : low + 4, "the answer comes back: again one write", "dim");
  for (const handler of page.handlers) {
    const { name, waiting } = handler, y = rows[name], gone = silent(handler);
    box(at.queue, y - 13, 41, 27);
    line(`M${at.queue + 14},${y - 13}v27m13,0v-27`, "box");
    text(at.queue + 20, y + 5, waiting || "", "b mid");
    box(x, y - 18, width, 37, gone ? "gone" : asked(name) ? "on" : "");
    text(x + width / 2, y + (gone ? -1 : 5), short(name, 13), "name mid");
    text(x + width / 2, y + 13, gone ? "no consumer" : "", "bad mid");
    spot(`queue ${name}`, at.queue + 20, y);
    spot(`handler ${name}`, x + 3, y - 14);
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
  const planned = live && trouble?.failed ? page.delays.slice(trouble.try) : [];
  const axis = axisOf(bars, waits, right - left - (planned.length ? 12 : 50), planned);
  const place = (time) => left + axis.place(time);
  for (const [name, row] of Object.entries(rows)) {
    const y = row + at.drop, mine = bars.filter((bar) => bar.by === name && bar.step < scene.lines.length);
    line(`M${left},${y}H${right}`, "lane");
    const works = scene.tokens.some(([where, who]) => where === "handler" && who === name);
    const state = works ? "at work" : asked(name) ? "in the queue" : "not asked yet";
    if (order && !mine.length) text(left + 2, y + 4, state, "dim halo");
    for (const { from, to, kind, step, first, cause } of mine) {
      const above = rows[scene.lines.find((each) => each.event === cause)?.by], x = place(from);
      if (first && above && above !== row) line(`M${x},${above + at.drop + 9}V${y}`, "link-line");
      const width = Math.max(1, place(to) - x);
      pen.put("rect", { x, y: y - 9, width, height: 18, rx: 2, class: `bar ${kind}`, "data-step": step });
    }
    const drawn = mine.map(({ step }) => step);
    for (const wait of waits.filter(({ step }) => drawn.includes(step))) drawWait(pen, wait, place, y, name);
    if (trouble?.by === name) planned.forEach((seconds, i) => {
      const x = left + axis.after(i), until = left + axis.after(i + 1);
      for (const each of i + 1 < planned.length ? [x] : [x, until]) pen.mark("planned", each, y);
      line(`M${x + 9},${y - 9}H${until - 9}v18H${x + 9}z`, "plan");
      text((x + until) / 2, y + 4, span(seconds * 1000), "dim mid halo");
    });
    let edge = -Infinity; // to the left of it there is text already
    mine.forEach(({ from, to, kind, step, label, tries }, i) => {
      const x = place(from), end = place(to), room = 14 + 7.3 * label.length;
      const limit = mine[i + 1] ? place(mine[i + 1].from) : right + (label === "done" ? 30 : 5);
      pen.mark(kind, end, y, 16, { "data-step": step });
      const below = tries ? end - 12 : x + 2, words = tries ? `try ${tries}` : span(to - from);
      if (below > edge) text(below, y + 25, words, "dim");
      if (below > edge) edge = below + 7.5 * words.length;
      if (end + room < limit) text(end + 14, y + 4, label, "mono halo");
      else text(Math.min(x + 2, right + 14 - room), y - 14, label, "mono halo");
    });
  }
  if (!order) return;
  text(left, low + 4, "0", "mono dim");
  if (axis.tick.x > 45 || axis.cut) text(left + Math.max(45, axis.tick.x), low + 4,
    span(axis.tick.ms) + (axis.cut ? ", then waits" : ""), `mono dim ${axis.cut ? "" : "mid"}`);
}

function drawWait({ put, text, spot }, { from, to }, place, y, name) {
  const x = place(from), width = place(to) - x, seconds = Math.ceil((to - now()) / 1000);
  for (const look of ["bar retrying", "hatch"]) put("rect", { x, y: y - 9, width, height: 18, class: look });
  if (seconds > 0) text(x + width / 2, y - 14, `next try in ${seconds} s`, "b mid halo");
  else text(x + width / 2, y + 4, span(to - from), "b mid halo");
  spot(`wait ${name}`, x + width / 2, y);
}

/** The bars and the waits of an order's timeline, in milliseconds since 1970. */
function piecesOf(order) {
  const announced = {}, due = {}, waits = [], start = Date.parse(order.createdAt);
  const over = order.timeline.find((line) => ["order_failed", "order_cancelled"].includes(line.event));
  const end = over ? Date.parse(over.at) : Infinity; // nobody waits any longer then
  const bars = order.timeline.flatMap((line, step) => {
    const cause = causeOf(line), to = Date.parse(line.at), key = `${line.by}/${cause}`, first = !(key in due);
    if (line.event) announced[line.event] = to;
    if (!cause) return [];
    const from = Math.min(to, due[key] ?? announced[cause] ?? start);
    if (line.next) waits.push({ step, from: to, to: (due[key] = Math.max(to, Math.min(end, Date.parse(line.next)))) });
    const label = line.event ?? (line.lost ? "too late" : line.done ? "done" : "");
    return [{ by: line.by, step, from, to, first, cause, kind: kindOf(line), label, tries: label ? 0 : line.try }];
  });
  return { bars: [{ by: "api", from: start, to: start }, ...bars], waits };
}

/** Where a time stands: to scale within a burst; what is longer than AT_ONCE is a little longer per doubling. */
function axisOf(bars, waits, room, planned) {
  const stops = [...new Set([...bars, ...waits].flatMap(({ from, to }) => [from, to]))].sort((a, b) => a - b);
  const gaps = stops.slice(1).map((stop, i) => stop - stops[i]);
  const cut = (ms) => 36 + 6 * Math.log2(Math.max(1, ms / 1000));
  const cuts = sum(gaps.filter((gap) => gap > AT_ONCE).map(cut)) + sum(planned.map((seconds) => cut(seconds * 1000)));
  const shrink = Math.min(1, (room * 0.8) / (cuts || 1)), burst = sum(gaps.filter((gap) => gap <= AT_ONCE));
  const perMs = Math.min(18, (room - cuts * shrink) / (burst || 1));
  const widths = gaps.map((gap) => (gap > AT_ONCE ? cut(gap) * shrink : gap * perMs));
  const place = (stop) => sum(widths.slice(0, stops.indexOf(stop)));
  const after = (n) => sum(widths) + sum(planned.slice(0, n).map((seconds) => cut(seconds * 1000) * shrink));
  const pause = gaps.findIndex((gap) => gap > AT_ONCE), last = stops[pause < 0 ? stops.length - 1 : pause];
  return { place, after, cut: pause >= 0, tick: { x: place(last), ms: last - stops[0] } };
}

// --- showing it all

function render() {
  const { order, ready, down, refused } = page, moments = order && !refused ? momentsOf(order) : [];
  if (page.moment >= moments.length) Object.assign(page, { moment: null, playing: false });
  const moment = moments[page.moment ?? -1], scene = sceneOf(order, moment);
  const [kind, title, text, timer = ""] = storyOf(order, moment, moments), letter = page.letter ?? scene.letter;

  fill($("headline"), [{ kind }, { title }], (item) => (item.kind ? icon(kind) : html("span", {}, title)));
  $("text").setAttribute("aria-live", page.playing ? "off" : "polite");
  if ($("text").textContent !== (page.notice || text)) $("text").textContent = page.notice || text;
  $("timer").textContent = timer;
  $("cancel").hidden = order?.status !== "pending" || Boolean(moment);
  $("redrive").hidden = !order?.parked || Boolean(moment);
  $("replay").textContent = page.playing ? "Pause" : "Replay slowly";
  $("replay").setAttribute("aria-disabled", !moments.length);
  $("back").setAttribute("aria-disabled", !moments.length || page.moment === 0);
  $("on").setAttribute("aria-disabled", !moment);
  $("key").hidden = !page.denied;

  const health = [["API", !down], ["store", ready.store !== "down"], ["broker", ready.broker !== "down"]];
  fill($("health"), health.slice(0, down ? 1 : 3), ([name, up]) => html("li", {},
    icon(up ? "done" : "parked"), ` ${name} `, html("span", { class: up ? "wide" : "" }, up ? "up" : "away")));
  fill($("orders"), page.orders.length ? page.orders.slice(0, 7).map(rowOf) : [null], orderRow);
  if (!$("stock").contains(document.activeElement)) fill($("stock"), page.stock, stockField);

  const settled = scene.lines.findLastIndex((line) => line.id), latest = scene.lines.length - 1;
  const chosen = Math.min(page.step ?? (moment || (order && troubleOf(order)) ? latest : settled), latest);
  const steps = scene.lines.map((line, i) => [line, i, i === chosen && !page.whole, order.createdAt]);
  fill($("steps"), steps.length ? steps : [null], stepRow);
  showJson(order, scene.lines[chosen]);
  fill($("letters"), Object.keys(CRASHES).map((name) => [name, name === letter]), ([name, on]) => html("button", {
    type: "button", "data-key": name, "data-letter": name, "aria-pressed": on,
    "aria-label": `${name}: ${CRASHES[name][0]}` }, name));
  fill($("crash"), [letter], crashText);
  const counting = scene.tokens.some(([where]) => where === "wait") && Math.floor(now() / 1000);
  const shown = [scene, title, letter, narrow(), ready.broker, page.handlers, page.handlers.map(silent), counting];
  fill($("picture"), [shown], () => draw(scene, order, letter, `An order's way, from API to dead letters. ${title}`));
  for (const node of document.querySelectorAll("[data-at]")) {
    node.textContent = span(Math.max(1000, now() - Date.parse(node.dataset.at))).replace(/\.\d/, "");
  }
}

function rowOf(order) {
  const { id, status, createdAt, customerId } = order, trouble = troubleOf(order), bad = trouble && kindOf(trouble);
  const states = [status !== "pending" || !bad ? status : "", bad].filter(Boolean);
  return [id, states, goods(order), customerId, createdAt, id === page.chosen];
}

function orderRow(row) {
  if (!row) return html("li", { class: "dim" }, "None yet.");
  const [id, states, what, who, at, chosen] = row, state = states.join(", ");
  const about = { type: "button", "data-key": id, "aria-current": chosen, click: () => choose(id) };
  return html("li", {}, html("button", about, icon(states[0]),
    html("span", { class: "who" }, what, " ", html("small", { class: "dim" }, who)),
    html("small", { class: state === "processed" ? "hidden" : "" }, state),
    html("small", { class: "age", "data-at": at })));
}

function stepRow(row) {
  if (!row) return html("li", { class: "dim" }, page.refused ? "None: the order does not exist." : "None yet.");
  const [line, step, chosen, start] = row, { by, event, error, sent, lost } = line;
  const what = event ?? (error ? `try ${line.try}, ${error}` : sent ? `sent ${sent}` : lost ? "too late" : "done");
  return html("li", {}, html("button", { type: "button", "data-key": step, "data-step": step, "aria-pressed": chosen },
    icon(kindOf(line)), html("b", {}, by), html("span", { class: event ? "mono" : "" }, what),
    html("span", { class: "mono dim" }, span(Date.parse(line.at) - Date.parse(start)))));
}

function showJson(order, line) {
  const { refused, whole } = page, event = line?.id && page.events.find((each) => each.id === line.id);
  const curl = [`curl ${new URL("orders", document.baseURI)} \\`,
    ` -H "Authorization: Bearer ${page.key === "demo-key" ? page.key : "$KEY"}" \\`,
    ' -H "Content-Type: application/json" \\', ` -d '${JSON.stringify({ ...CUSTOMER, ...EXAMPLES.good })}'`];
  const [title, value] = refused ? [`The answer, ${refused.status}`, refused] : !line ? ["The same from a terminal"]
    : whole ? ["The order", order] : event ? [`The event ${event.type}`, event] : ["Its line in the timeline", line];
  $("json-title").textContent = title;
  $("whole").hidden = !line;
  $("whole").textContent = whole ? "its step" : "whole order";
  fill($("json"), value ? jsonLines(value) : curl.map((text) => ({ key: "", text })),
    ({ key, text }) => html("div", {}, html("span", { class: "dim" }, key), text));
}

function crashText(letter) {
  const [title, saved, without, file, name] = CRASHES[letter];
  return html("div", {}, html("p", {}, html("b", {}, `${letter}: ${title}. `), saved),
    html("p", {}, html("b", {}, "Without it: "), without),
    html("p", {}, html("b", {}, "Read "), html("code", {}, `${file} ${name}`)));
}

function stockField({ sku, available }) {
  const set = async ({ target }) => {
    const { status, data } = await api(`stock/${sku}`, "PUT", JSON.stringify({ available: Number(target.value) }));
    $("stock-says").textContent = `${sku}: ${status < 300 ? "set" : data.errors?.[0].message ?? data.detail}`;
    target.value = data.available ?? available;
  };
  const field = html("input", { type: "number", min: 0, value: available, "data-key": sku, change: set });
  return html("li", {}, html("label", {}, html("b", {}, sku), " ", field));
}

// --- what a person does

function step(by) {
  const count = page.order ? momentsOf(page.order).length : 0;
  if (!count || (page.moment === null && by > 0)) return;
  Object.assign(page, { playing: false, step: null, letter: null, moment: Math.max(0, (page.moment ?? count) + by) });
}

function play() {
  if (page.order) Object.assign(page, { playing: !page.playing, step: null, letter: null, moment: page.moment ?? 0 });
}

async function sendExample(name) {
  const customerId = CUSTOMERS[page.placed++ % CUSTOMERS.length];
  const { status, data } = await place(JSON.stringify({ customerId, ...EXAMPLES[name] }));
  if (status !== 201) Object.assign(page, FRESH, { refused: data });
  render();
  $("headline").focus();
}

async function sendOwn() {
  const { status, data } = await place($("body").value);
  if (status === 201) return $("dialog").close();
  const lines = data.errors ? jsonLines(JSON.parse($("body").value)) : []; // so that each fault has a line
  if (data.errors) $("body").value = lines.map(({ key, text }) => key + text).join("\n");
  const faults = (data.errors ?? [{ pointer: "", message: `${data.title}: ${data.detail}` }]).map((fault) => {
    let at = -1; // where a field is missing, the line of what should have it
    for (let place = fault.pointer; data.errors && at < 0; place = place.replace(/\/[^/]*$/, "")) {
      at = lines.findIndex((line) => line.pointer === place);
    }
    return { ...fault, at };
  });
  fill($("faults"), faults.sort((a, b) => a.at - b.at), ({ pointer, message, at }) => {
    const ends = lines.map(({ key, text }) => key.length + text.length + 1), start = sum(ends.slice(0, at));
    const select = () => { $("body").focus(); $("body").setSelectionRange(start, start + (ends[at] ?? 1) - 1); };
    const where = at < 0 ? "" : `Line ${at + 1}, ${pointer} `;
    return html("li", {}, html("button", { type: "button", click: select }, where + message));
  });
}

function clicked({ target }) {
  page.notice = "";
  const on = target.closest("[data-step], [data-letter], [data-example]")?.dataset ?? {};
  if (on.step) Object.assign(page, { step: Number(on.step), whole: false });
  if (on.letter) page.letter = on.letter;
  if (on.example) sendExample(on.example);
  const does = { own: () => $("dialog").showModal(), close: () => $("dialog").close(), send: sendOwn, replay: play,
    cancel: () => act("cancel"), redrive: () => act("redrive"), back: () => step(-1), on: () => step(1),
    whole: () => { page.whole = !page.whole; }, theme: () => theme($("theme").textContent === "Dark") };
  does[target.id]?.();
  render();
}

function pressed({ key, target }) {
  if (key === "Escape") Object.assign(page, { step: null, letter: null, whole: false });
  if (["ArrowLeft", "ArrowRight"].includes(key) && $("tools").contains(target)) step(key === "ArrowLeft" ? -1 : 1);
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
  theme(matchMedia("(prefers-color-scheme: dark)").matches);
  fill($("legend"), Object.entries(LEGEND), ([kind, meaning]) => html("li", {}, icon(kind), ` ${meaning}`));
  const body = { ...CUSTOMER, ...EXAMPLES.good, shippingAddress: ADDRESS };
  $("body").value = JSON.stringify(body, null, 1);
  $("key").addEventListener("change", ({ target }) => {
    sessionStorage.setItem("key", (page.key = target.value));
    page.denied = false;
  });
  document.addEventListener("click", clicked);
  document.addEventListener("keydown", pressed);
  setInterval(() => page.playing && (page.moment++, render()), MOMENT);
  setInterval(render, 1000);
  keep(lookAtHealth, true);
  for (const look of [lookAtOrder, lookAtOrders, lookAtHandlers, lookAtStock]) keep(look);
}

start();
