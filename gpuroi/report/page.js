"use strict";

// Tables that sort, and slices that follow what is clicked. The page is whole without this script.
(() => {
  const AXES = ["x", "y", "z"];
  const ZERO = 128, STEPS = 127;  // codes of values
  const OPACITY = 0.65;           // of regions; their edges and the chosen one are opaque
  const MOST_ALIVE = 8;           // maps whose volumes are held in memory

  const page = JSON.parse(document.getElementById("report-data").textContent);
  document.documentElement.classList.add("scripted");

  // ---- volumes -------------------------------------------------------------------------------

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  async function backdropOf(packed) {
    if (packed === null) return null;
    return { ...packed, data: new Uint8Array(await unpack(packed.grey)) };
  }

  let shared = null;  // the backdrop of all maps that have none of their own, decoded once

  async function volumesOf(map) {
    const Labels = { 8: Uint8Array, 16: Uint16Array, 32: Uint32Array }[map.bits];
    if (shared === null) shared = backdropOf(page.backdrop);
    const labels = new Labels(await unpack(map.labels));
    const packed = new Uint8Array(await unpack(map.values));
    return {
      labels: { shape: map.shape, inverse: map.inverse, data: labels },
      values: spread(packed, labels, map.peaks.length),
      backdrop: await (map.backdrop === null ? shared : backdropOf(map.backdrop)),
    };
  }

  // Values come region by region: put each where its label is.
  function spread(packed, labels, count) {
    const next = new Uint32Array(count + 2);
    for (const label of labels) next[label + 1] += 1;
    next[1] = 0;
    for (let label = 2; label < next.length; label += 1) next[label] += next[label - 1];
    const values = new Uint8Array(labels.length).fill(ZERO);
    for (let voxel = 0; voxel < labels.length; voxel += 1) {
      if (labels[voxel] > 0) values[voxel] = packed[next[labels[voxel]]++];
    }
    return values;
  }

  // ---- slices --------------------------------------------------------------------------------

  // Calls visit(pixel, x, y, z) with the voxel coordinates of each pixel of a slice, row by row.
  function walk(panel, cross, inverse, visit) {
    const { axis, across, up, width, height, bounds, scale } = panel;
    const mm = [0, 0, 0];
    mm[axis] = cross[axis];
    for (let row = 0, pixel = 0; row < height; row += 1) {
      mm[up] = bounds[up][1] - (row + 0.5) / scale;
      for (let column = 0; column < width; column += 1, pixel += 1) {
        mm[across] = bounds[across][0] + (column + 0.5) / scale;
        const [a, b, c] = inverse;
        visit(
          pixel,
          a[0] * mm[0] + a[1] * mm[1] + a[2] * mm[2] + a[3],
          b[0] * mm[0] + b[1] * mm[1] + b[2] * mm[2] + b[3],
          c[0] * mm[0] + c[1] * mm[1] + c[2] * mm[2] + c[3],
        );
      }
    }
  }

  // The voxel that a place lies in, as a position in the data; -1 outside.
  function nearest([nx, ny, nz], x, y, z) {
    const i = Math.floor(x + 0.5), j = Math.floor(y + 0.5), k = Math.floor(z + 0.5);
    return i < 0 || j < 0 || k < 0 || i >= nx || j >= ny || k >= nz ? -1 : (i * ny + j) * nz + k;
  }

  // Grey between voxels; 0 where most of what is around is not drawn.
  function between({ shape: [nx, ny, nz], data }, x, y, z) {
    const i = Math.floor(x), j = Math.floor(y), k = Math.floor(z);
    if (i < -1 || j < -1 || k < -1 || i >= nx || j >= ny || k >= nz) return 0;
    let total = 0, drawn = 0;
    for (let corner = 0; corner < 8; corner += 1) {
      const di = corner & 1, dj = (corner >> 1) & 1, dk = corner >> 2;
      const ci = i + di, cj = j + dj, ck = k + dk;
      if (ci < 0 || cj < 0 || ck < 0 || ci >= nx || cj >= ny || ck >= nz) continue;
      const grey = data[(ci * ny + cj) * nz + ck];
      if (grey === 0) continue;
      const weight = Math.abs(1 - di - (x - i)) * Math.abs(1 - dj - (y - j)) * Math.abs(1 - dk - (z - k));
      total += weight * grey;
      drawn += weight;
    }
    return drawn > 0.5 ? total / drawn : 0;
  }

  const parts = (color) => [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));
  const REGION_COLORS = page.colors.map(parts);
  const VALUE_COLORS = page.shades.map(parts);
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const differs = (at, column, row, label) =>
    at(column - 1, row) !== label || at(column + 1, row) !== label ||
    at(column, row - 1) !== label || at(column, row + 1) !== label;

  const isNear = (at, column, row, label) =>
    at(column - 1, row) === label || at(column + 1, row) === label ||
    at(column, row - 1) === label || at(column, row + 1) === label ||
    at(column - 2, row) === label || at(column + 2, row) === label ||
    at(column, row - 2) === label || at(column, row + 2) === label;

  function paint(viewer, panel) {
    const { labels, values, backdrop } = viewer.volumes;
    const { width, height } = panel;
    const front = new Uint32Array(width * height);
    const codes = new Uint8Array(width * height);
    const grey = new Uint8Array(width * height);
    walk(panel, viewer.cross, labels.inverse, (pixel, x, y, z) => {
      const voxel = nearest(labels.shape, x, y, z);
      if (voxel >= 0) {
        front[pixel] = labels.data[voxel];
        codes[pixel] = values[voxel];
      }
    });
    if (backdrop !== null) {
      walk(panel, viewer.cross, backdrop.inverse, (pixel, x, y, z) => {
        grey[pixel] = between(backdrop, x, y, z);
      });
    }
    const context = panel.canvas.getContext("2d", { willReadFrequently: true });
    const image = context.createImageData(width, height);
    const surface = parts(style("--band"));
    const ring = parts(style("--ink"));
    const at = (column, row) =>
      column < 0 || row < 0 || column >= width || row >= height ? 0 : front[row * width + column];
    for (let row = 0, pixel = 0; row < height; row += 1) {
      for (let column = 0; column < width; column += 1, pixel += 1) {
        const label = front[pixel];
        let color = grey[pixel] > 0 ? [grey[pixel], grey[pixel], grey[pixel]] : surface;
        if (label > 0) {
          const region = REGION_COLORS[(label - 1) % REGION_COLORS.length];
          const isEdge = differs(at, column, row, label);
          if (viewer.showsValues) color = isEdge && label !== viewer.chosen ? region : VALUE_COLORS[codes[pixel]];
          else if (isEdge || label === viewer.chosen) color = region;
          else color = color.map((behind, part) => OPACITY * region[part] + (1 - OPACITY) * behind);
        }
        if (viewer.chosen > 0 && label !== viewer.chosen && isNear(at, column, row, viewer.chosen)) {
          color = ring;
        }
        image.data.set(color, 4 * pixel);
        image.data[4 * pixel + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    annotate(viewer, panel, context);
  }

  // Draws the cross, open in its middle so that the voxel is seen, and what is written on a slice.
  function annotate(viewer, panel, context) {
    const { width, height, axis } = panel;
    const [column, row] = pixelOf(panel, viewer.cross);
    context.strokeStyle = context.fillStyle = style("--ink");
    context.globalAlpha = 0.55;
    context.beginPath();
    for (const [from, to] of [[0, column - 6], [column + 7, width]]) {
      context.moveTo(from, row + 0.5);
      context.lineTo(Math.max(from, to), row + 0.5);
    }
    for (const [from, to] of [[0, row - 6], [row + 7, height]]) {
      context.moveTo(column + 0.5, from);
      context.lineTo(column + 0.5, Math.max(from, to));
    }
    context.stroke();
    context.globalAlpha = 1;
    context.font = "600 13px system-ui, sans-serif";
    context.textBaseline = "top";
    const [left, right] = axis === 0 ? ["P", "A"] : ["L", "R"];
    context.textAlign = "left";
    context.fillText(left, 5, 5);
    context.textAlign = "right";
    context.fillText(right, width - 5, 5);
    context.textAlign = "left";
    context.textBaseline = "bottom";
    context.fillText(`${AXES[axis]} = ${millimetres(viewer.cross[axis])} mm`, 5, height - 4);
  }

  function pixelOf({ across, up, bounds, scale }, cross) {
    return [
      Math.floor((cross[across] - bounds[across][0]) * scale),
      Math.floor((bounds[up][1] - cross[up]) * scale),
    ];
  }

  const withMinus = (text) => text.replace("-", "\u2212");
  const millimetres = (mm) => withMinus(mm.toFixed(1).replace(/^-(0\.0)$/, "$1"));

  // ---- viewers -------------------------------------------------------------------------------

  class Viewer {
    constructor(section, map, volumes) {
      this.section = section;
      this.map = map;
      this.volumes = volumes;
      this.chosen = 0;
      this.showsValues = section.querySelector("[data-values]").getAttribute("aria-pressed") === "true";
      this.cross = [...(map.peaks[Number(section.dataset.first) - 1])];
      this.panels = [...section.querySelectorAll("canvas[data-axis]")].map((canvas) => {
        const axis = AXES.indexOf(canvas.dataset.axis);
        const [across, up] = [0, 1, 2].filter((other) => other !== axis);
        const { width, height } = canvas;
        return { canvas, axis, across, up, width, height, bounds: map.bounds, scale: map.scale };
      });
    }

    // The label and the code of the value where the cross is.
    here() {
      const { labels, values } = this.volumes;
      const [x, y, z] = labels.inverse.map(
        (row) => row[0] * this.cross[0] + row[1] * this.cross[1] + row[2] * this.cross[2] + row[3],
      );
      const voxel = nearest(labels.shape, x, y, z);
      return voxel < 0 ? [0, ZERO] : [labels.data[voxel], values[voxel]];
    }

    draw() {
      for (const panel of this.panels) paint(this, panel);
      const [label, code] = this.here();
      const said = AXES.map((name, axis) => `${name} ${millimetres(this.cross[axis])}`).join(" ");
      const value = ((code - ZERO) / STEPS) * this.map.reach;
      const found = label > 0 ? `region ${label}, value about ${withMinus(value.toPrecision(2))}` : "no region";
      this.section.querySelector(".readout").textContent = `${said} mm: ${found}`;
      this.section.querySelector(".viewer").dataset.state = "ready";
    }

    choose(label) {
      this.chosen = label;
      for (const row of this.section.querySelectorAll("tr[data-label]")) {
        row.setAttribute("aria-selected", String(Number(row.dataset.label) === label));
      }
    }

    goToRegion(label) {
      this.choose(label);
      this.cross = [...this.map.peaks[label - 1]];
      this.draw();
    }

    goTo(cross) {
      this.cross = cross.map((mm, axis) => {
        const [low, high] = this.map.bounds[axis];
        return Math.min(Math.max(mm, low), high - 1e-6);
      });
      this.choose(this.here()[0]);
      this.draw();
    }

    move(axis, steps) {
      this.goTo(this.cross.map((mm, other) => (other === axis ? mm + steps * this.map.step : mm)));
    }
  }

  const alive = new Map();  // from sections to promises of viewers, the latest used last

  function viewerOf(section) {
    const known = alive.get(section);
    alive.delete(section);
    const promise = known ?? open(section);
    alive.set(section, promise);
    if (alive.size > MOST_ALIVE) alive.delete(alive.keys().next().value);
    return promise;
  }

  async function open(section) {
    const readout = section.querySelector(".readout");
    try {
      const map = await mapOf(section);
      const viewer = new Viewer(section, map, await volumesOf(map));
      viewer.draw();
      return viewer;
    } catch (error) {
      alive.delete(section);
      readout.textContent = `The slices cannot be shown: ${error.message}`;
      throw error;
    }
  }

  const act = (section, action) => viewerOf(section).then(action, () => {});

  // ---- maps that lie beside the page ----------------------------------------------------------

  const arriving = new Map();

  function mapOf(section) {
    const number = section.dataset.map;
    if (page.maps[number]) return Promise.resolve(page.maps[number]);
    return new Promise((resolve, reject) => {
      arriving.set(number, resolve);
      const script = document.createElement("script");
      script.src = `report_data/${number}.js`;
      script.onerror = () => reject(new Error(`${script.getAttribute("src")} is not beside this page.`));
      script.onload = () => script.remove();
      document.head.append(script);
    }).then((map) => {
      const picture = section.querySelector("img");
      if (picture !== null && map.picture) {
        picture.src = map.picture;
        picture.closest("figure").hidden = false;
      }
      return map;
    });
  }

  window.gpuroiReport = { receive: (number, map) => arriving.get(number)(map) };

  // ---- tables --------------------------------------------------------------------------------

  const words = new Intl.Collator("en", { numeric: true });

  // Numbers by size, words by letter, blanks always last.
  function compare(one, other, sign) {
    if (one === "" || other === "") return (one === "") - (other === "");
    const difference = Number(one) - Number(other);
    return sign * (Number.isNaN(difference) ? words.compare(one, other) : difference);
  }

  function sort(button) {
    const header = button.closest("th");
    const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", direction);
    const body = header.closest("table").tBodies[0];
    const sign = direction === "ascending" ? 1 : -1;
    const text = (row) => row.cells[header.cellIndex].textContent;
    body.append(...[...body.rows].sort((one, other) => compare(text(one), text(other), sign)));
  }

  // One row at a time is reached by Tab; arrows go on from there.
  function keep(row) {
    for (const other of row.parentElement.rows) other.tabIndex = other === row ? 0 : -1;
  }

  function onRowKey(event) {
    const row = event.currentTarget;
    const beside = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling }[event.key];
    if (event.key === "Enter" || event.key === " ") row.click();
    else if (beside) {
      keep(beside);
      beside.focus();
    } else return;
    event.preventDefault();
  }

  // ---- what is done with them -----------------------------------------------------------------

  function onSliceKey(event, section, panel) {
    const steps = {
      ArrowLeft: [panel.across, -1],
      ArrowRight: [panel.across, 1],
      ArrowDown: [panel.up, -1],
      ArrowUp: [panel.up, 1],
      PageDown: [panel.axis, -1],
      PageUp: [panel.axis, 1],
    }[event.key];
    if (!steps) return;
    event.preventDefault();
    act(section, (viewer) => viewer.move(...steps));
  }

  function wire(section) {
    const table = section.querySelector("table");
    table.setAttribute("role", "grid");
    const rows = [...table.querySelectorAll("tr[data-label]")];
    for (const row of rows) {
      row.setAttribute("aria-selected", "false");
      row.addEventListener("keydown", onRowKey);
      row.addEventListener("click", () => {
        keep(row);
        act(section, (viewer) => viewer.goToRegion(Number(row.dataset.label)));
      });
    }
    keep(rows[0]);
    for (const canvas of section.querySelectorAll("canvas[data-axis]")) {
      canvas.tabIndex = 0;
      const axis = AXES.indexOf(canvas.dataset.axis);
      const [across, up] = [0, 1, 2].filter((other) => other !== axis);
      canvas.addEventListener("keydown", (event) => onSliceKey(event, section, { axis, across, up }));
      canvas.addEventListener("click", (event) =>
        act(section, (viewer) => {
          const { bounds, scale } = viewer.map;
          const perPixel = canvas.width / canvas.clientWidth / scale;
          const cross = [...viewer.cross];
          cross[across] = bounds[across][0] + event.offsetX * perPixel;
          cross[up] = bounds[up][1] - event.offsetY * perPixel;
          viewer.goTo(cross);
        }),
      );
    }
    section.querySelector("[data-open]")?.addEventListener("click", () => act(section, () => {}));
    const button = section.querySelector("[data-values]");
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(pressed));
      act(section, (viewer) => {
        viewer.showsValues = pressed;
        showScale(section, viewer.map.reach, pressed);
        viewer.draw();
      });
    });
  }

  function showScale(section, reach, shown) {
    const scale = section.querySelector(".scale");
    scale.hidden = !shown;
    const [low, high] = scale.querySelectorAll("span");
    low.textContent = `\u2212${reach.toPrecision(3)}`;
    high.textContent = reach.toPrecision(3);
    const context = scale.querySelector("canvas").getContext("2d");
    VALUE_COLORS.slice(1).forEach((color, column) => {
      context.fillStyle = `rgb(${color.join(" ")})`;
      context.fillRect(column, 0, 1, 1);
    });
  }

  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => sort(button));
  }
  const sections = [...document.querySelectorAll("section[data-map]")];
  sections.forEach(wire);
  const seen = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        act(target, () => {});
      }
    },
    { rootMargin: "200px" },
  );
  // Those beside the page are loaded when they are asked for.
  sections.filter((section) => page.maps[section.dataset.map]).forEach((section) => seen.observe(section));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const promise of alive.values()) promise.then((viewer) => viewer.draw(), () => {});
  });
})();
