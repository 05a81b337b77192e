// Of gallery.html. `show` gives viewer.js a value, and is null where there is no WebGL: then the pictures are shown.
//
// #shapes holds [{name, vertices, faces}] in base64: `vertices` three uint8 each (x, y, z; y up), `faces` three
// little-endian uint16 each. A button names its shapes, one or two, in data-shapes; data-given says how many of the
// first faces of the first one were given to the model.

const shapes = JSON.parse(document.querySelector("#shapes").textContent);
const buttons = [...document.querySelectorAll("button[data-shapes]")];

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

// The corners of all faces as viewer.js takes them, of the shape in the middle with its longest side of 1.
function corners(shape) {
  const vertices = bytes(shape.vertices), faces = new Uint16Array(bytes(shape.faces).buffer);
  const low = [255, 255, 255], high = [0, 0, 0];
  vertices.forEach((level, place) => {
    low[place % 3] = Math.min(low[place % 3], level);
    high[place % 3] = Math.max(high[place % 3], level);
  });
  const size = Math.max(1, ...high.map((level, axis) => level - low[axis]));
  const values = new Float32Array(3 * faces.length);
  for (let place = 0; place < values.length; place++) {
    const axis = place % 3;
    values[place] = (vertices[3 * faces[Math.floor(place / 3)] + axis] - (low[axis] + high[axis]) / 2) / size;
  }
  let text = "";
  for (const byte of new Uint8Array(values.buffer)) text += String.fromCharCode(byte);
  return btoa(text);
}

function choose(button) {
  buttons.forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
  document.querySelector("#caption").textContent = button.title;
  if (show) {
    const meshes = button.dataset.shapes.split(" ").map((place, number) => {
      const shape = shapes[place], given = number === 0 ? Number(button.dataset.given) : 0;
      return { faces: corners(shape), given, ended: true, seed: null, name: shape.name };
    });
    show({ run: buttons.indexOf(button), meshes, is_over: true, is_still: true, hint: null });
  } else {
    document.querySelector("#pictures").replaceChildren(
      ...[...button.querySelectorAll("img")].map((picture) => picture.cloneNode()),
    );
  }
}

buttons.forEach((button, place) => {
  button.addEventListener("click", () => choose(button));
  button.addEventListener("keydown", (event) => {
    const last = buttons.length - 1;
    const next = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const other = buttons[Math.max(0, Math.min(last, next))];
    other.focus();
    choose(other);
  });
});
document.body.classList.toggle("flat", !show);
choose(buttons[0]);
