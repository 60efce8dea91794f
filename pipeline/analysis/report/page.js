"use strict";
for (const zoom of document.querySelectorAll(".zoom")) {
  const image = zoom.querySelector("img"), canvas = zoom.querySelector("canvas"), told = zoom.querySelector(".told");
  const [rows, columns] = zoom.querySelectorAll("select");
  const most = 720, least = 24; // pixels of the canvas
  const span = (select) => select.value.split(" ").map(Number);
  const draw = () => {
    const [top, bottom, height] = span(rows), [left, right, width] = span(columns);
    const tall = bottom - top, broad = right - left, scale = Math.min(most / tall, most / broad);
    canvas.width = Math.max(least, Math.round(broad * scale));
    canvas.height = Math.max(least, Math.round(tall * scale));
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(image, left, top, broad, tall, 0, 0, canvas.width, canvas.height);
    const name = (select) => select.selectedOptions[0].textContent;
    told.textContent = height || width ? `rows: ${name(rows)}${height ? ` (${height}, ${tall} in the picture)` : ""}; ` +
      `columns: ${name(columns)}${width ? ` (${width}, ${broad} in the picture)` : ""}` : "";
  };
  const at = (select, place) => [...select.options].findIndex((option, k) => {
    const [from, to] = option.value.split(" ").map(Number);
    return k && from <= place && place < to;
  });
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    const [top, bottom] = span(rows), [left, right] = span(columns);
    const row = top + (event.clientY - box.top) / box.height * (bottom - top);
    const column = left + (event.clientX - box.left) / box.width * (right - left);
    if (rows.selectedIndex && columns.selectedIndex) rows.selectedIndex = columns.selectedIndex = 0;
    else [rows.selectedIndex, columns.selectedIndex] = [at(rows, row), at(columns, column)];
    draw();
  });
  rows.addEventListener("change", draw);
  columns.addEventListener("change", draw);
  zoom.hidden = false;
  image.decode().then(draw);
}
