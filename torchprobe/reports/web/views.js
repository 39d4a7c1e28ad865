// What is shown of runs, in the report's page and in the Probe tab: verdict, alerts, and views that share a step and a layer.
"use strict";
(() => {
  const { floats, ints, number, at, curve, heat, flow, heads, place } = torchprobe.charts;

  const PAUSE = 80; // milliseconds between charts that are drawn again while the slider moves
  const FIRST = ["overview", "train", "val"]; // groups of curves that stand above the layers
  const ABOVE = ["Layers to look at", "Final and best"]; // and tables

  function h(tag, properties, ...children) {
    const element = document.createElement(tag);
    const { class: names, data, ...rest } = properties || {};
    if (names) element.className = names;
    for (const [key, value] of Object.entries(data || {})) element.dataset[key] = value;
    Object.assign(element, rest);
    element.append(...children.filter((child) => child !== null && child !== undefined)); // strings become text nodes
    return element;
  }

  /** Decode the arrays of a run's views, once. */
  function decoded(run) {
    const array = (part) => ({ ...part, steps: ints(part.steps), values: part.values === null ? null : floats(part.values) });
    return { ...run, curves: run.curves.map(array), layers: run.layers.map(array), heads: run.heads.map(array) };
  }

  /** The row that a module's or parameter's name stands for: itself, else the nearest one around or inside it. */
  function rowOf(names, where) {
    if (!where) return -1;
    const exact = names.indexOf(where);
    if (exact >= 0) return exact;
    const around = names.map((name, i) => [where.startsWith(name + ".") ? name.length : -1, i]).sort((a, b) => b[0] - a[0])[0];
    return around && around[0] > 0 ? around[1] : names.findIndex((name) => name.startsWith(where + "."));
  }

  class Board {
    constructor(root, source) {
      this.root = root;
      this.source = source;
      this.state = { step: 0, layer: null, log: false, smoothing: 0 };
      this.cards = [];
      this.runs = [];
      this.watcher = new IntersectionObserver((entries) => entries.forEach((entry) => this.seen(entry)), { rootMargin: "150px" });
    }

    /** Show these runs side by side. What was chosen stays chosen; a slider at the end follows a run that goes on. */
    show(runs) {
      const steps = (of) => [...new Set(of.flatMap((run) => [...run.layers, ...run.heads, ...run.curves].flatMap((part) => Array.from(part.steps))))].sort((a, b) => a - b);
      const atEnd = !this.runs.length || this.state.step >= this.steps[this.steps.length - 1];
      this.runs = runs.map(decoded);
      this.steps = steps(this.runs);
      if (!this.steps.length) this.steps = [0];
      if (atEnd) this.state.step = this.steps[this.steps.length - 1];
      this.watcher.disconnect();
      this.cards.filter((card) => card.drawn).forEach((card) => Plotly.purge(card.element));
      this.cards = [];
      const columns = h("div", { class: `tp-columns tp-${this.runs.length}` }, ...this.runs.map((run, i) => this.column(run, i)));
      this.root.replaceChildren(this.bar(), columns);
      this.cards.forEach((card) => this.watcher.observe(card.element));
      this.told();
    }

    set(change) {
      const redraw = "log" in change || "smoothing" in change;
      Object.assign(this.state, change);
      this.told();
      if (this.frame) { this.redraw ||= redraw; return; }
      this.redraw = redraw;
      this.frame = requestAnimationFrame(() => {
        this.frame = null;
        for (const card of this.cards) {
          if (!card.live) card.stale = card.drawn;
          else if (card.move && !this.redraw) card.move();
          else card.late = true;
        }
        this.later ||= setTimeout(() => this.drawLate(), PAUSE);
      });
    }

    /** What takes long is drawn a few times a second while the slider moves, and at last where it stops. */
    drawLate() {
      this.later = null;
      for (const card of this.cards.filter((one) => one.late)) {
        card.late = false;
        if (card.live) card.draw();
        else card.stale = card.drawn;
      }
    }

    seen(entry) {
      const card = this.cards.find((one) => one.element === entry.target);
      if (!card) return;
      card.live = entry.isIntersecting;
      if (card.live && (!card.drawn || card.stale)) {
        card.drawn = true;
        card.stale = false;
        card.draw();
      }
    }

    /** The controls that all views obey. */
    bar() {
      const slider = h("input", { type: "range", min: 0, max: this.steps.length - 1, class: "tp-step", ariaLabel: "step" });
      slider.addEventListener("input", () => this.set({ step: this.steps[slider.value] }));
      const shown = h("output", { class: "tp-step-shown" });
      const layers = [...new Set(this.runs.flatMap((run) => run.layers.flatMap((view) => view.layers)))];
      const layer = h("select", { class: "tp-layer", ariaLabel: "layer" }, h("option", { value: "" }, "all layers"), ...layers.map((name) => h("option", { value: name }, name)));
      layer.addEventListener("change", () => this.set({ layer: layer.value || null }));
      const log = h("input", { type: "checkbox", class: "tp-log", checked: this.state.log });
      log.addEventListener("change", () => this.set({ log: log.checked }));
      const smooth = h("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: this.state.smoothing, class: "tp-smooth", ariaLabel: "smoothing" });
      smooth.addEventListener("input", () => this.set({ smoothing: Number(smooth.value) }));
      const play = h("button", { class: "tp-play", title: "play the steps" }, "▶");
      play.addEventListener("click", () => this.play(play));
      this.told = () => {
        slider.value = at(this.steps, this.state.step);
        shown.textContent = `step ${this.state.step} of ${this.steps[this.steps.length - 1]}`;
        if (![...layer.options].some((option) => option.value === (this.state.layer || ""))) layer.append(h("option", { value: this.state.layer }, this.state.layer));
        layer.value = this.state.layer || "";
      };
      return h("div", { class: "tp-bar" }, play, slider, shown, layer, h("label", {}, log, " log"), h("label", {}, "smoothing ", smooth));
    }

    play(button) {
      if (this.timer) { clearInterval(this.timer); this.timer = null; button.textContent = "▶"; return; }
      button.textContent = "⏸";
      if (at(this.steps, this.state.step) >= this.steps.length - 1) this.set({ step: this.steps[0] });
      const stride = Math.max(1, Math.round(this.steps.length / 120));
      this.timer = setInterval(() => {
        const next = Math.min(at(this.steps, this.state.step) + stride, this.steps.length - 1);
        this.set({ step: this.steps[next] });
        if (next >= this.steps.length - 1) this.play(button);
      }, 80);
    }

    column(run, i) {
      const sections = [this.verdict(run), this.alerts(run), ...this.curves(run, FIRST), this.tables(run, true), ...this.maps(run), ...this.heads(run), ...this.pictures(run), ...this.curves(run), this.tables(run, false)].filter(Boolean);
      const contents = h("nav", { class: "tp-contents" }, ...sections.filter((s) => s.dataset.title).map((section) => {
        const link = h("a", { href: "#" }, section.dataset.title);
        link.addEventListener("click", (event) => { event.preventDefault(); section.open = true; section.scrollIntoView({ behavior: "smooth" }); });
        return link;
      }));
      return h("section", { class: "tp-run", data: { run: run.name } }, h("h1", {}, run.name), h("p", { class: "tp-headline" }, run.headline + (run.hparams ? ` · ${run.hparams}` : "")), sections[0], contents, ...sections.slice(1));
    }

    section(title, ...children) {
      return h("details", { class: "tp-section", open: true, data: { title } }, h("summary", {}, title), ...children);
    }

    verdict(run) {
      const { verdict } = run;
      const list = verdict.look_at.map((thing) => {
        const item = h("li", {}, h("a", { class: "tp-go", href: "#", title: "show this step and layer" }, thing.what), thing.advice ? h("p", { class: "tp-advice" }, thing.advice) : null);
        item.firstChild.addEventListener("click", (event) => { event.preventDefault(); this.go(thing); });
        return item;
      });
      const box = h("div", { class: `tp-verdict ${verdict.healthy ? "tp-good" : verdict.look_at.every((thing) => thing.over) ? "tp-over" : "tp-bad"}` }, h("strong", {}, verdict.line), ...run.endings.map((ending) => h("p", {}, ending)), h("ol", {}, ...list));
      return box;
    }

    go(alert) {
      this.set({ step: this.steps[at(this.steps, alert.step)], layer: alert.where || null });
    }

    alerts(run) {
      if (!run.alerts.length) return this.section("Alerts", h("p", { class: "tp-none" }, "No alert."));
      const rows = run.alerts.map((alert) => {
        const where = alert.where ? alert.where + (alert.last ? ` to ${alert.last} (${alert.members})` : "") : "whole run";
        const when = alert.until === null ? `since step ${alert.step}` : `step ${alert.step} to ${alert.until}`;
        const row = h("button", { class: "tp-alert", title: alert.message, data: { step: alert.step, rule: alert.rule } }, h("b", {}, alert.name), h("span", {}, where), h("span", { class: "tp-when" }, when));
        row.addEventListener("click", () => this.go(alert));
        return row;
      });
      return this.section(`Alerts (${rows.length})`, h("div", { class: "tp-alerts" }, ...rows));
    }

    card(title, height, kind) {
      const element = h("div", { class: "tp-chart", data: { kind, title } });
      element.style.height = `${height}px`;
      return { element, box: h("figure", { class: "tp-card" }, h("figcaption", {}, title), element) };
    }

    add(element, draw, moveOnly) {
      const card = { element, drawn: false, live: false, stale: false, draw, move: moveOnly };
      this.cards.push(card);
      return card;
    }

    maps(run) {
      const sections = run.layers.map((view) => {
        const { element, box } = this.card(view.title, Math.min(Math.max(view.layers.length * 15 + 70, 170), 620), "heat");
        const marked = () => place(element, this.state.step, rowOf(view.layers, this.state.layer));
        this.add(element, () => heat(element, view, run.alerts).then(() => this.drawn(element, marked, view)), marked);
        return this.section(view.title, box);
      });
      const gradients = run.layers.find((view) => view.title.startsWith("Gradient norm by"));
      if (gradients) {
        const { element, box } = this.card("Gradient norm of every layer at the step, over its range in the run", 330, "flow");
        const marked = () => place(element, rowOf(gradients.layers, this.state.layer), null);
        this.add(element, () => flow(element, gradients, this.state).then(() => this.drawn(element, marked)));
        sections.splice(1, 0, this.section("Gradient flow", box));
      }
      return sections;
    }

    /** A chart was drawn: its marks stay where they belong when it is zoomed, and its cells can be chosen. */
    drawn(element, marked, view) {
      marked();
      if (element.dataset.ready) return;
      element.dataset.ready = "yes";
      element.on("plotly_afterplot", marked);
      if (view) element.on("plotly_click", ({ points: [point] }) => this.set({ step: this.steps[at(this.steps, point.x)], layer: view.layers[point.y] }));
    }

    heads(run) {
      if (!run.heads.length) return [];
      const pick = h("select", { class: "tp-statistic", ariaLabel: "statistic of heads" }, ...run.heads.map((view, k) => h("option", { value: k }, view.title)));
      const { element, box } = this.card("Every head at the step; colours span the whole run", Math.min(Math.max(run.heads[0].layers.length * 16 + 70, 170), 700), "heads");
      const draw = async () => {
        const view = run.heads[pick.value], column = at(view.steps, this.state.step);
        const size = view.shape[1] * view.shape[2];
        const asked = (this.asked = {});
        const matrix = view.values ? view.values.subarray(column * size, (column + 1) * size) : await this.matrix(run, view, view.steps[column]);
        if (asked !== this.asked && this.runs.length < 2) return; // the step has moved on
        element.dataset.step = view.steps[column];
        const marked = () => place(element, null, rowOf(run.heads[pick.value].layers, this.state.layer));
        heads(element, view, matrix).then(() => this.drawn(element, marked));
      };
      this.add(element, draw);
      pick.addEventListener("change", draw);
      return [this.section("Attention heads", pick, box)];
    }

    async matrix(run, view, step) {
      view.known ||= new Map();
      if (!view.known.has(step)) view.known.set(step, floats(await this.source.matrix(run.name, view.title, step)));
      return view.known.get(step);
    }

    pictures(run) {
      const titles = [...new Set(run.pictures.map((picture) => picture.title))];
      return titles.map((title) => this.section(title, h("div", { class: "tp-grid" }, ...run.pictures.filter((p) => p.title === title).map((picture) => {
        const image = h("img", { alt: picture.tag }), caption = h("figcaption", {});
        const element = h("figure", { class: "tp-card tp-picture", data: { kind: "picture", title: picture.tag } }, caption, image);
        const draw = () => {
          const point = picture.points[at(picture.points.map((p) => p.step), this.state.step)];
          image.src = `data:image/png;base64,${point.png}`;
          element.dataset.step = point.step;
          caption.textContent = `${picture.tag}, step ${point.step}`;
        };
        this.add(element, draw, draw);
        return element;
      }))));
    }

    /** Those of some groups, or those of all others. */
    curves(run, chosen) {
      const shown = new Map(run.curves.map((part) => [part.tag, part]));
      const partner = (tag) => shown.get(tag.startsWith("train/") ? tag.replace("train/", "val/") : `val/${tag}`);
      const second = new Set(run.curves.map((part) => partner(part.tag)).filter(Boolean));
      const groups = new Map();
      for (const part of run.curves) if (!second.has(part)) groups.set(part.group, [...(groups.get(part.group) || []), part]);
      const wanted = [...groups].filter(([group]) => (chosen ? chosen.includes(group) : !FIRST.includes(group)));
      return wanted.map(([group, parts]) => this.section(group, h("div", { class: "tp-grid" }, ...parts.map((part) => {
        const both = [part, partner(part.tag)].filter(Boolean);
        const last = part.values[part.values.length - 1];
        const { element, box } = this.card(both.map((one) => one.tag).join(" and "), 200, "curve");
        box.firstChild.append(h("span", { class: "tp-last" }, number(last)));
        const marked = () => place(element, this.state.step, null);
        this.add(element, () => curve(element, both, run.alerts, this.state).then(() => this.drawn(element, marked)), marked);
        return box;
      }))));
    }

    /** first: the tables that stand above the charts, or the others. */
    tables(run, first) {
      const chosen = run.tables.filter((table) => table.rows.length && ABOVE.includes(table.title) === first);
      if (!chosen.length) return null;
      const drawn = chosen.map((table) => h("table", {}, h("caption", {}, table.title), h("thead", {}, h("tr", {}, ...table.columns.map((name) => h("th", {}, name)))), h("tbody", {}, ...table.rows.map((row, i) => h("tr", {}, ...row.map((cell, k) => h("td", { class: typeof cell === "number" || cell === null ? "tp-number" : "" }, k === 0 && i > 0 && cell === table.rows[i - 1][0] ? "" : typeof cell === "string" ? cell : number(cell))))))));
      const advice = !first && run.next_steps.length ? h("div", {}, h("h3", {}, "What to try, the gravest first"), h("ol", { class: "tp-next" }, ...run.next_steps.map((text) => h("li", {}, text)))) : null;
      return this.section(first ? "Layers to look at, final and best" : "Numbers and what to try", h("div", { class: "tp-tables" }, ...drawn), advice);
    }
  }

  torchprobe.h = h;
  torchprobe.show = (root, runs, source) => {
    const board = new Board(root, source);
    board.show(runs);
    return board;
  };
})();
