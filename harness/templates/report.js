"use strict";
// Filters, sorting and ratios. The page is whole without them; their state is in the URL's hash.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const board = by("board") && leaderboard();
  const parity = by("parity-rows") && parityRows();

  function leaderboard() {
    const { cells, names } = data.sweep;
    const rows = data.sweep.rows.map((values) => Object.fromEntries(values.map((value, index) => [names[index], value])));
    const form = by("filters");
    const bodies = [...by("board").tBodies];
    const heads = [...by("board").tHead.rows[0].cells];
    const lines = bodies.flatMap((body) => [...body.rows].slice(1));
    const ratioColumn = heads.findIndex((head) => head.firstChild.dataset.sort === "ratio");
    const start = { sort: "rank", order: "ascending" };
    let sorting = { ...start };
    rows.forEach((row, index) => { row.line = lines[index]; });

    function update() {
      const wanted = Object.fromEntries(new FormData(form));
      const text = wanted.q.trim().toLowerCase();
      const inCell = cells.map((cell) => ["inner", "case", "dtype", "pass", "cache"].every((name) => !wanted[name] || cell[name] === wanted[name]));
      const shownIn = new Set();
      let shown = 0;
      for (const row of rows) {
        const show = inCell[row.cell] && ofStatus(row.status, wanted.status) && row.implementation.toLowerCase().includes(text);
        row.line.hidden = !show;
        if (show) { shown += 1; shownIn.add(row.cell); }
      }
      bodies.forEach((body, index) => { body.hidden = !shownIn.has(index); });
      by("found").textContent = shown ? `${shown} of ${rows.length} rows, in ${count(shownIn.size, "cell")}` : "No row fits these filters.";
      setRatios(wanted.base);
      sortLines();
    }

    function setRatios(name) {
      const base = cells.map(() => null);
      for (const row of rows) {
        if (row.status !== "ok" || !cells[row.cell].comparable) continue;
        if (name ? row.implementation === name : row.rank === 1) base[row.cell] = row.device_ms;
      }
      for (const row of rows) {
        if (row.status !== "ok") continue;
        row.ratio = base[row.cell] ? base[row.cell] / row.device_ms : null;
        row.line.cells[ratioColumn].textContent = row.ratio ? `${significant(row.ratio)}×` : "–";
      }
    }

    function sortLines() {
      const { sort, order } = sorting;
      const sign = order === "ascending" ? 1 : -1;
      const parts = cells.map(() => []);
      rows.forEach((row, index) => parts[row.cell].push([row, index]));
      parts.forEach((part, index) => {
        part.sort(([a, i], [b, j]) => {
          const [x, y] = [a[sort] ?? null, b[sort] ?? null];
          if (x === null || y === null) return (x === null) - (y === null) || i - j; // what has no number comes last
          return sign * (typeof x === "string" ? x.localeCompare(y, "en") : x - y) || i - j;
        });
        bodies[index].append(...part.map(([row]) => row.line));
      });
      for (const head of heads) {
        if (head.firstChild.dataset.sort === sort) head.setAttribute("aria-sort", order);
        else head.removeAttribute("aria-sort");
      }
    }

    by("board").tHead.addEventListener("click", (event) => {
      const name = event.target.closest("button")?.dataset.sort;
      if (!name) return;
      const turned = sorting.sort === name && sorting.order === "ascending";
      sorting = { sort: name, order: turned ? "descending" : "ascending" };
      sortLines();
      remember();
    });
    return {
      form, update,
      state: () => ({ ...changed(form), ...(sorting.sort === start.sort && sorting.order === start.order ? {} : sorting) }),
      restore: (state) => {
        restoreForm(form, state);
        const known = heads.some((head) => head.firstChild.dataset.sort === state.sort);
        sorting = known ? { sort: state.sort, order: state.order === "descending" ? "descending" : "ascending" } : { ...start };
        update();
      },
      reset: () => { sorting = { ...start }; },
    };
  }

  function parityRows() {
    const form = by("parity-filters");
    const names = ["implementation", "inner", "case", "dtype", "tensor", "status"];
    const most = 100;
    let all = false;

    function update() {
      const wanted = Object.fromEntries(new FormData(form));
      // A row without a tensor speaks for all of them.
      const fits = (row) => names.every((name, column) => !wanted[`p.${name}`] || row[column] === wanted[`p.${name}`] || (name === "tensor" && !row[column]));
      const found = data.parity.filter(fits);
      const shown = all ? found : found.slice(0, most);
      by("parity-rows").tBodies[0].replaceChildren(...shown.map(line));
      by("parity-found").textContent = found.length === 0 ? "No row fits these filters."
        : shown.length < found.length ? `The ${most} worst of ${found.length} rows` : `${count(found.length, "row")}, the worst first`;
      by("parity-all").hidden = shown.length === found.length;
    }

    function line(texts) {
      const row = document.createElement("tr");
      if (texts[5] !== "ok") row.className = texts[5] === "unsupported" ? "muted" : "bad";
      texts.forEach((text, column) => {
        const cell = document.createElement(column ? "td" : "th");
        if (!column) cell.scope = "row";
        if (column === 5) cell.className = "status";
        if (column === 7) {
          cell.className = "reason";
          cell.append(Object.assign(document.createElement("span"), { textContent: text || "–" }));
        } else cell.textContent = text || "–";
        row.append(cell);
      });
      return row;
    }

    by("parity-all").addEventListener("click", () => { all = true; update(); by("rows").focus(); });
    for (const table of document.querySelectorAll(".matrix")) {
      table.addEventListener("click", (event) => {
        const link = event.target.closest("a");
        if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        all = false;
        restoreForm(form, stateOf(link.hash));
        update();
        remember();
        by("rows").focus();
        by("rows").scrollIntoView();
      });
    }
    return { form, update, state: () => changed(form), restore: (state) => { restoreForm(form, state); update(); }, reset: () => { all = false; } };
  }

  function ofStatus(status, wanted) {
    if (wanted === "failing") return status !== "ok" && status !== "unsupported";
    return wanted === "-unsupported" ? status !== "unsupported" : !wanted || status === wanted;
  }

  function count(number, what) {
    return `${number} ${what}${number === 1 ? "" : "s"}`;
  }

  // Three significant digits without an exponent, as in the page's other numbers.
  function significant(value) {
    const places = Math.max(0, 2 - Math.floor(Math.log10(value)));
    return value.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places });
  }

  function normal(control) {
    return control.tagName === "SELECT" ? ([...control.options].find((option) => option.defaultSelected) ?? control.options[0]).value : "";
  }

  function controls(form) {
    return [...form.elements].filter((control) => control.name);
  }

  function changed(form) {
    return Object.fromEntries(controls(form).filter((control) => control.value !== normal(control)).map((control) => [control.name, control.value]));
  }

  function restoreForm(form, state) {
    for (const control of controls(form)) {
      control.value = state[control.name] ?? normal(control);
      if (control.selectedIndex === -1) control.value = normal(control); // a value that this page does not have
    }
  }

  function stateOf(hash) {
    return Object.fromEntries(new URLSearchParams(hash.slice(1)));
  }

  const parts = [board, parity].filter(Boolean);

  function remember() {
    const state = new URLSearchParams(Object.assign({}, ...parts.map((part) => part.state())));
    history.replaceState(null, "", `#${state}`);
  }

  function restore() {
    if (location.hash && !location.hash.includes("=")) return; // a section, not a state
    parts.forEach((part) => part.restore(stateOf(location.hash)));
  }

  for (const part of parts) {
    for (const type of ["input", "change"]) part.form.addEventListener(type, () => { part.update(); remember(); }); // a driver may send but one
    part.form.addEventListener("submit", (event) => event.preventDefault());
    part.form.addEventListener("reset", () => setTimeout(() => { part.reset(); part.update(); remember(); }));
    part.update();
  }
  restore();
  window.addEventListener("hashchange", restore);
  if (parity && location.hash.includes("p.")) by("rows").scrollIntoView();
})();
