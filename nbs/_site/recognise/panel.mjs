// The panel that recognises: pictures of each class in, answers for new pictures out, all in this browser.
import { adapt, predict } from "./inner_loop.mjs";

const root = document.getElementById("recognise");
const find = selector => root.querySelector(selector);
const { networks, runtime } = JSON.parse(find("script[type='application/json']").textContent);
const file = name => new URL(name, import.meta.url).href;

let network = null; // { size, crop, way, lr, steps, embed }
let classes = [];   // { card, name, pictures }; a picture is { canvas, feature, label, truth }
let queries = [];

function say(text, state = "ready") {
  find(".status").textContent = text;
  root.dataset.state = state;
}

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// The network, loaded on the first click

async function get(name) {
  const response = await fetch(file(name));
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

async function load(name) {
  const ort = await import("./ort.wasm.min.mjs");
  ort.env.wasm.numThreads = 1; // more need headers that a static host does not send
  ort.env.wasm.wasmPaths = file("./");
  const about = await (await get(`${name}.json`)).json();
  const session = await ort.InferenceSession.create(await (await get(`${name}.onnx`)).arrayBuffer());
  const embed = async canvas => {
    const pixels = new ort.Tensor("float32", planes(canvas), [1, 3, about.size, about.size]);
    return (await session.run({ pixels })).features.data;
  };
  return { ...about, embed };
}

// From a picture to pixels

function cut(image, x, y, side, size) {
  const canvas = element("canvas", { width: size, height: size });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // behind transparent parts
  context.fillRect(0, 0, size, size);
  context.drawImage(image, x, y, side, side, 0, 0, size, size);
  return canvas;
}

// The centre of a picture, at the size of the network.
async function square(image, { size, crop }) {
  const side = Math.round(Math.min(image.width, image.height) * crop);
  const [x, y] = [image.width, image.height].map(length => Math.round((length - side) / 2));
  const small = await createImageBitmap(image, x, y, side, side,
    { resizeWidth: size, resizeHeight: size, resizeQuality: "high" });
  return cut(small, 0, 0, small.width, size);
}

// All reds, then all greens, then all blues, from 0 to 255.
function planes(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const n = data.length / 4;
  return Float32Array.from({ length: 3 * n }, (_, i) => data[4 * (i % n) + Math.floor(i / n)]);
}

async function picture(canvas, label, truth = null) {
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  return { canvas, label, truth, feature: await network.embed(canvas) };
}

// Jobs run one after another; what goes wrong is said.
let last = Promise.resolve();
function inTurn(job) {
  last = last.then(job).catch(error => say(`That did not work: ${error.message}`, "failed"));
}

function addFiles(files, pictures) {
  inTurn(async () => {
    say(`Reading ${files.length} ${files.length === 1 ? "file" : "files"} …`, "busy");
    const bad = [];
    for (const one of files) {
      const image = await createImageBitmap(one).catch(() => null);
      if (image) pictures.push(await picture(await square(image, network), one.name));
      else bad.push(one.name);
    }
    update(bad.length ? `Not a picture that this browser can read: ${bad.join(", ")}.` : "");
  });
}

function zone(node, pictures) {
  const input = node.querySelector("input[type=file]");
  input.onchange = () => { addFiles([...input.files], pictures()); input.value = ""; };
  node.ondragover = event => { event.preventDefault(); node.classList.add("over"); };
  node.ondragleave = () => node.classList.remove("over");
  node.ondrop = event => {
    event.preventDefault();
    node.classList.remove("over");
    addFiles([...event.dataTransfer.files], pictures());
  };
}

// Classes and answers

function addClass(name = `class ${classes.length + 1}`) {
  const card = find("template").content.firstElementChild.cloneNode(true);
  const one = { card, name, pictures: [] };
  const input = card.querySelector("input[type=text]");
  input.value = name;
  input.oninput = () => { one.name = input.value; update(); };
  card.querySelector(".remove").onclick = () => {
    classes = classes.filter(other => other !== one);
    card.remove();
    find(".add").focus();
    update();
  };
  zone(card, () => one.pictures);
  classes.push(one);
  find(".classes").append(card);
  return one;
}

function showPictures({ card, name, pictures }) {
  card.querySelector(".pictures").replaceChildren(...pictures.map((one, i) => {
    const remove = element("button", { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Remove ${one.label} from ${name}`);
    remove.onclick = () => {
      pictures.splice(i, 1);
      card.querySelector("input[type=file]").focus();
      update();
    };
    return element("div", { className: "picture" }, one.canvas, remove);
  }));
}

function bar(name, share) {
  const percent = element("span", { textContent: `${Math.round(100 * share)} %` });
  const row = element("li", {}, element("span", { textContent: name, title: name }), percent);
  row.style.setProperty("--share", `${100 * share}%`);
  return row;
}

function answer(query, shares, shown) {
  const order = shown.map((_, i) => i).sort((a, b) => shares[b] - shares[a]);
  const bars = element("ol", { className: "bars" }, ...order.slice(0, 5).map(i => bar(shown[i].name, shares[i])));
  const item = element("li", {}, query.canvas, bars);
  if (!shown.length) return item;
  item.dataset.answer = shown[order[0]].name;
  item.dataset.shares = JSON.stringify(shares);
  if (!query.truth) return item;
  query.right = query.truth === shown[order[0]];
  const verdict = query.right ? "right" : `it is ${query.truth.name}`;
  bars.append(element("li", { className: "verdict", textContent: verdict }));
  return item;
}

function update(problem = "") {
  classes.forEach(showPictures);
  const shown = classes.filter(one => one.pictures.length), ready = shown.length >= 2;
  const support = shown.flatMap(one => one.pictures.map(o => o.feature));
  const labels = shown.flatMap((one, c) => one.pictures.map(() => c));
  const lr = ready ? network.lr * shown.length / network.way : 0; // a picture moves the head as far as in training
  const A = ready ? adapt(support, labels, shown.length, lr, network.steps) : [];
  const shares = ready ? predict(A, support, queries.map(o => o.feature)) : [];
  find(".answers").replaceChildren(...queries.map((o, i) => answer(o, shares[i], ready ? shown : [])));
  find(".clear").hidden = !queries.length;
  const known = queries.filter(o => o.truth), right = known.filter(o => o.right).length;
  let text = `${shown.length} classes learned. Now choose new pictures.`;
  if (!ready) text = "Give at least two classes a picture each.";
  else if (queries.length) text = `${queries.length} answers, from ${shown.length} classes.`;
  if (ready && known.length) text += ` Right: ${right} of ${known.length}.`;
  say(`${problem} ${text}`.trim());
}

// The start: two empty classes, or a prepared task from a sprite. Its rows are classes, its first column is shown.

async function fillFromSprite({ sprite, names }) {
  const image = await createImageBitmap(await (await get(sprite)).blob());
  const { size } = network;
  for (const [row, name] of names.entries()) {
    const one = addClass(name);
    for (let column = 0; column < image.width / size; column++) {
      const canvas = cut(image, column * size, row * size, size, size);
      if (column) queries.push(await picture(canvas, "a new glyph", one));
      else one.pictures.push(await picture(canvas, `glyph ${name}`));
    }
  }
}

function start(chosen, prepared) {
  inTurn(async () => {
    say("Loading …", "busy");
    network = await load(chosen.name);
    [classes, queries] = [[], []];
    find(".classes").replaceChildren();
    if (prepared) await fillFromSprite(chosen);
    else for (let i = 0; i < 2; i++) addClass();
    find(".network").textContent = chosen.hint;
    find(".work").hidden = false;
    update();
  });
}

function startButton(chosen, prepared) {
  const title = prepared ? `Try it with ${chosen.name}` : chosen.title;
  const textContent = `${title} (loads ${chosen.megabytes} MB)`;
  const button = element("button", { type: "button", textContent, disabled: !runtime });
  button.dataset.start = `${chosen.name}${prepared ? "-prepared" : ""}`;
  button.onclick = () => start(chosen, prepared);
  return button;
}

for (const one of networks) {
  if (one.sprite) find(".start").append(startButton(one, true));
  find(".start").append(startButton(one, false));
}
find(".add").onclick = () => addClass().card.querySelector("input").select();
find(".clear").onclick = () => { queries = []; find(".queries input").focus(); update(); };
zone(find(".queries"), () => queries);
if (!runtime) say("This build of the site has no runtime: it was made on a machine without npm.", "off");
else if (!networks.length) say("This build of the site has no network.", "off");
else say("Nothing is loaded yet.", "start");
