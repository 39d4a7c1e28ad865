// The Probe tab: chooses runs, fetches what is shown of them, keeps up with those that train.
const address = (path) => new URL(path, import.meta.url).href; // relative, for --path_prefix
const SECONDS = 5;

async function get(path, asked = {}) {
  const response = await fetch(`${address(path)}?${new URLSearchParams(asked)}`);
  if (!response.ok) throw new Error(await response.text());
  return response;
}

function script(path) {
  return new Promise((resolve, reject) => {
    const element = document.createElement("script");
    element.src = address(path);
    element.onload = resolve;
    // What the server says is better than that it failed.
    element.onerror = () => get(path).then(() => reject(new Error(`${path} cannot be run`)), reject);
    document.head.append(element);
  });
}

function theme() {
  try {
    const dark = window.parent.document.body.classList.contains("dark-mode");
    document.documentElement.dataset.theme = dark ? "dark" : "light";
  } catch (error) {
    // Another origin: the system's choice holds.
  }
}

class Tab {
  constructor(root, torchprobe) {
    this.torchprobe = torchprobe;
    this.shown = new Map(); // versions by run
    this.chosen = [null, null];
    this.pickers = [0, 1].map((i) => this.picker(i));
    this.message = torchprobe.h("p", { className: "tp-headline" });
    this.views = torchprobe.h("div", {});
    const choose = torchprobe.h("div", { class: "tp-choose" }, "run ", this.pickers[0], " beside ", this.pickers[1]);
    root.replaceChildren(choose, this.message, this.views);
  }

  picker(i) {
    const select = this.torchprobe.h("select", { ariaLabel: i ? "second run" : "run" });
    select.addEventListener("change", () => { this.chosen[i] = select.value || null; this.update(); });
    return select;
  }

  async update() {
    const { runs, remote } = await (await get("./runs")).json();
    this.message.textContent = remote.length ? `Not read here, since not a local folder: ${remote.join(", ")}. "torchprobe report" reads it.` : runs.length ? "" : "No run yet.";
    const versions = new Map(runs.map((run) => [run.run, run.version]));
    this.chosen = this.chosen.map((run) => (versions.has(run) ? run : null));
    this.chosen[0] ??= runs.length ? runs[0].run : null;
    this.pickers.forEach((picker, i) => this.options(picker, [...versions.keys()].sort(), i));
    const wanted = [...new Set(this.chosen.filter(Boolean))];
    const now = new Map(wanted.map((run) => [run, versions.get(run)]));
    if (JSON.stringify([...now]) === JSON.stringify([...this.shown])) return;
    this.shown = now;
    await this.draw(wanted);
  }

  options(picker, names, i) {
    const values = i ? ["", ...names] : names;
    if (JSON.stringify([...picker.options].map((one) => one.value)) !== JSON.stringify(values)) {
      picker.replaceChildren(...values.map((name) => this.torchprobe.h("option", { value: name }, name || "no other run")));
    }
    picker.value = this.chosen[i] ?? "";
  }

  async draw(wanted) {
    const views = await Promise.all(wanted.map(async (run) => (await get("./views", { run })).json()));
    if (JSON.stringify(wanted) !== JSON.stringify([...this.shown.keys()])) return; // others were chosen meanwhile
    if (this.board) this.board.show(views);
    else this.board = this.torchprobe.show(this.views, views, { matrix: async (run, statistic, step) => (await get("./heads", { run, statistic, step })).text() });
  }
}

export async function render() {
  const root = document.createElement("div");
  root.className = "tp-tab";
  root.textContent = "Reading the runs …";
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = address("./views.css");
  document.head.append(style);
  document.body.append(root);
  theme();
  try {
    for (const path of ["./plotly.js", "./charts.js", "./views.js"]) await script(path);
    const tab = new Tab(root, window.torchprobe);
    const turn = async () => {
      theme();
      if (!document.hidden) await tab.update().catch((error) => { tab.message.textContent = `${error.message}`; });
      setTimeout(turn, SECONDS * 1000);
    };
    await turn();
  } catch (error) {
    root.textContent = `The Probe tab cannot be shown: ${error.message}`;
  }
}
