// The body of a function of gr.HTML(js_on_load=...): `element`, `props`, `watch` and `trigger` are gradio's, or those of
// page.html.
//
// props.value is {run, meshes: [{faces, given, ended, seed, name}], is_over, is_still, hint}: `faces` holds, in base64,
// nine little-endian float32 a face (three corners of x, y, z; y up, within half a unit of the origin). A mesh without
// `name` is called by its number. Within a run the text only grows at its end. When the run is over, meshes can be
// chosen, and scrubbed back. In a run that `is_still` no face is shown as new.

const VALUES = 5; // of a corner: x, y, z, the second it appears at, 1 for a corner of the part that was given
const TEXT = 48; // characters of a face
const SPREAD = 0.12; // seconds over which the faces of one update appear
const GLOW = 2; // seconds after which a new face looks like the others
const START = { yaw: 0.6, pitch: 0.42, distance: 2.3 };

const root = element.querySelector(".viewer");
const canvas = root.querySelector("canvas");
const cells = root.querySelector(".cells");
const hint = root.querySelector(".hint");
const scrub = element.querySelector(".scrub input");
const scrubbed = element.querySelector(".scrub output");
const camera = { ...START };
const began = performance.now();
let gl, programs, meshes = [], run, chosen = 0, wireframe = true, turning = false, lastBirth = -GLOW, frame = 0;
let shown = Infinity; // faces of each mesh, at most

const FACE_VERTEX = `#version 300 es
in vec3 position; in float birth; in float given;
uniform mat4 projection, view; uniform float time; uniform int newest;
out vec3 place, seen, corner; out float age, isGiven;
void main() {
  place = position; isGiven = given; age = gl_VertexID / 3 == newest ? 0.0 : time - birth;
  corner = vec3(equal(ivec3(gl_VertexID % 3), ivec3(0, 1, 2)));
  vec4 v = view * vec4(position, 1.0);
  seen = v.xyz;
  gl_Position = age < 0.0 ? vec4(2.0, 2.0, 2.0, 1.0) : projection * v;
}`;
// Faces are flat: the normal is that of the screen's plane through the place. Its side is told by the winding.
const FACE_PIXEL = `#version 300 es
precision highp float;
in vec3 place, seen, corner; in float age, isGiven;
uniform float edges;
out vec4 colour;
void main() {
  vec3 up = normalize(cross(dFdx(place), dFdy(place)));
  vec3 n = normalize(cross(dFdx(seen), dFdy(seen)));
  vec3 outside = mix(vec3(0.53, 0.72, 0.90), vec3(0.80, 0.80, 0.78), isGiven);
  vec3 base = gl_FrontFacing ? outside : vec3(0.87, 0.49, 0.42);
  float key = max(dot(n, normalize(vec3(-0.35, 0.55, 0.75))), 0.0);
  float fill = max(dot(n, normalize(vec3(0.8, 0.1, 0.5))), 0.0);
  float light = 0.56 + 0.36 * key + 0.16 * fill + 0.10 * up.y;
  vec3 fresh = vec3(1.0, 0.82, 0.42) * mix(1.0, light, 0.5);
  vec3 lit = mix(base * light, fresh, 0.9 * exp(-3.0 * age) * (1.0 - isGiven));
  vec3 dx = dFdx(corner), dy = dFdy(corner);
  vec3 away = corner / sqrt(dx * dx + dy * dy);
  float line = 1.0 - smoothstep(0.4, 1.2, min(away.x, min(away.y, away.z)));
  colour = vec4(mix(lit, vec3(0.10, 0.16, 0.24), 0.9 * line * edges), 1.0);
}`;
const FLOOR_VERTEX = `#version 300 es
uniform mat4 projection, view; uniform float level;
out vec2 place;
void main() {
  place = vec2(gl_VertexID & 1, gl_VertexID >> 1) * 2.0 - 1.0;
  gl_Position = projection * view * vec4(place.x, level, place.y, 1.0);
}`;
const FLOOR_PIXEL = `#version 300 es
precision highp float;
in vec2 place;
uniform vec3 ink;
out vec4 colour;
void main() {
  vec2 cell = place * 8.0;
  vec2 near = abs(fract(cell - 0.5) - 0.5) / fwidth(cell);
  float line = 1.0 - smoothstep(0.3, 1.3, min(near.x, near.y));
  float alpha = 0.3 * line * smoothstep(1.0, 0.3, length(place));
  colour = vec4(ink * alpha, alpha);
}`;

function build(vertex, pixel) {
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, pixel]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost()) {
    throw new Error(gl.getProgramInfoLog(program) || "a shader does not compile");
  }
  return { program, at: (name) => gl.getUniformLocation(program, name) };
}

function begin() {
  gl = canvas.getContext("webgl2", { antialias: true, alpha: true });
  if (!gl) {
    say("This browser shows no 3D: WebGL 2 is missing or switched off. Meshes are made all the same.");
    return;
  }
  gl.enable(gl.DEPTH_TEST);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  programs = { faces: build(FACE_VERTEX, FACE_PIXEL), floor: build(FLOOR_VERTEX, FLOOR_PIXEL) };
  meshes.forEach((mesh) => { mesh.buffer = null; });
  draw();
}

function say(text) {
  hint.textContent = text;
  hint.hidden = !text;
}

function now() {
  return (performance.now() - began) / 1000;
}

function newMesh() {
  const label = document.createElement("div");
  label.className = "cell";
  cells.append(label);
  return { label, faces: 0, corners: new Float32Array(0), buffer: null, floor: 0 };
}

function show(value) {
  if (!value) return;
  if (value.run !== run || value.meshes.length < meshes.length) {
    meshes.forEach((mesh) => { mesh.label.remove(); if (mesh.buffer) gl.deleteBuffer(mesh.buffer); });
    meshes = [];
    run = value.run;
    chosen = 0;
    shown = Infinity;
  }
  while (meshes.length < value.meshes.length) meshes.push(newMesh());
  value.meshes.forEach((given, index) => extend(meshes[index], given, value.is_still));
  if (gl) say(meshes.length ? "" : value.hint || hint.dataset.empty);
  const most = Math.max(0, ...meshes.map((mesh) => mesh.faces));
  scrub.disabled = !value.is_over || !most;
  scrub.max = most;
  scrub.value = Math.min(shown, most);
  describe(value);
  draw();
}

function extend(mesh, { faces, given }, isStill) {
  const bytes = Uint8Array.from(atob(faces.slice(mesh.faces * TEXT)), (letter) => letter.charCodeAt(0));
  const places = new Float32Array(bytes.buffer);
  const added = places.length / 9;
  if (!added) return;
  const used = mesh.faces * 3 * VALUES;
  if (used + added * 3 * VALUES > mesh.corners.length) {
    const larger = new Float32Array(2 * (used + added * 3 * VALUES));
    larger.set(mesh.corners.subarray(0, used));
    mesh.corners = larger;
  }
  const time = now();
  for (let corner = 0; corner < added * 3; corner++) {
    const face = Math.floor(corner / 3);
    const isGiven = mesh.faces + face < given;
    const birth = isGiven || isStill ? time - GLOW : time + (SPREAD * face) / added;
    mesh.corners.set(places.subarray(corner * 3, corner * 3 + 3), used + corner * VALUES);
    mesh.corners.set([birth, isGiven ? 1 : 0], used + corner * VALUES + 3);
    mesh.floor = Math.min(mesh.faces + face === 0 && corner === 0 ? Infinity : mesh.floor, places[corner * 3 + 1]);
  }
  mesh.faces += added;
  mesh.isNew = true;
  if (!isStill) lastBirth = time + SPREAD;
}

function count(mesh) {
  return Math.min(shown, mesh.faces);
}

function describe(value) {
  meshes.forEach((mesh, index) => {
    const { ended, seed, name } = value.meshes[index];
    const faces = count(mesh) < mesh.faces ? `${count(mesh)} of ${mesh.faces}` : mesh.faces;
    const ofSeed = seed == null ? "" : ` · seed ${seed}`;
    mesh.label.classList.toggle("growing", !ended);
    mesh.label.classList.toggle("chosen", index === chosen && meshes.length > 1);
    mesh.label.textContent = `${name ?? index + 1} · ${faces} ${mesh.faces === 1 ? "face" : "faces"}${ofSeed}`;
  });
  root.dataset.faces = meshes.reduce((sum, mesh) => sum + mesh.faces, 0);
  root.dataset.shown = meshes.reduce((sum, mesh) => sum + count(mesh), 0);
  scrubbed.textContent = scrub.disabled ? "" : `${scrub.value} of ${scrub.max}`;
}

// The grid whose square cells are largest: columns, rows.
function grid(width, height) {
  const count = Math.max(meshes.length, 1);
  let best = [1, count], size = 0;
  for (let columns = 1; columns <= count; columns++) {
    const rows = Math.ceil(count / columns);
    const side = Math.min(width / columns, height / rows);
    if (side > size + 0.5) [best, size] = [[columns, rows], side];
  }
  return best;
}

function fill(mesh) {
  if (!mesh.buffer) {
    mesh.buffer = gl.createBuffer();
    mesh.isNew = true;
  }
  gl.bindBuffer(gl.ARRAY_BUFFER, mesh.buffer);
  if (mesh.isNew) gl.bufferData(gl.ARRAY_BUFFER, mesh.corners, gl.DYNAMIC_DRAW);
  mesh.isNew = false;
}

function draw() {
  if (gl && !frame) frame = requestAnimationFrame(paint);
}

function paint() {
  frame = 0;
  if (!element.isConnected || gl.isContextLost()) return;
  const scale = Math.min(window.devicePixelRatio || 1, 2);
  const width = Math.round(root.clientWidth * scale), height = Math.round(root.clientHeight * scale);
  if (!width || !height) return;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  if (turning) camera.yaw += 0.008;
  const [columns, rows] = grid(width, height);
  const w = Math.floor(width / columns), h = Math.floor(height / rows);
  gl.viewport(0, 0, width, height);
  gl.clearColor(0, 0, 0, 0);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  const projection = perspective(w / h), view = look();
  const isDark = document.body.classList.contains("dark"); // gradio's theme
  root.classList.toggle("dark", isDark);
  const ink = isDark ? [0.6, 0.66, 0.75] : [0.35, 0.42, 0.5];
  meshes.forEach((mesh, index) => {
    const column = index % columns, row = Math.floor(index / columns);
    gl.viewport(column * w, height - (row + 1) * h, w, h);
    Object.assign(mesh.label.style, {
      left: `${(100 * column) / columns}%`, top: `${(100 * row) / rows}%`,
      width: `${100 / columns}%`, height: `${100 / rows}%`,
    });
    if (mesh.faces) paintMesh(mesh, projection, view, ink);
  });
  if (turning || now() < lastBirth + GLOW) draw();
}

function paintMesh(mesh, projection, view, ink) {
  const { floor, faces } = programs;
  gl.useProgram(floor.program);
  gl.uniformMatrix4fv(floor.at("projection"), false, projection);
  gl.uniformMatrix4fv(floor.at("view"), false, view);
  gl.uniform1f(floor.at("level"), mesh.floor - 0.002);
  gl.uniform3fv(floor.at("ink"), ink);
  gl.depthMask(false);
  gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
  gl.depthMask(true);

  gl.useProgram(faces.program);
  fill(mesh);
  let offset = 0;
  for (const [name, size] of [["position", 3], ["birth", 1], ["given", 1]]) {
    const place = gl.getAttribLocation(faces.program, name);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, size, gl.FLOAT, false, VALUES * 4, offset * 4);
    offset += size;
  }
  gl.uniformMatrix4fv(faces.at("projection"), false, projection);
  gl.uniformMatrix4fv(faces.at("view"), false, view);
  gl.uniform1f(faces.at("time"), now());
  gl.uniform1f(faces.at("edges"), wireframe ? 1 : 0);
  gl.uniform1i(faces.at("newest"), shown < mesh.faces ? shown - 1 : -1);
  gl.drawArrays(gl.TRIANGLES, 0, count(mesh) * 3);
  for (const name of ["position", "birth", "given"]) {
    gl.disableVertexAttribArray(gl.getAttribLocation(faces.program, name));
  }
}

// Matrices column by column, as WebGL takes them. The shorter side of a cell sees the same angle.
function perspective(aspect) {
  const f = 2.75, near = 0.05, far = 20, x = f / Math.max(aspect, 1), y = f * Math.min(aspect, 1);
  return [x, 0, 0, 0, 0, y, 0, 0, 0, 0, (far + near) / (near - far), -1, 0, 0, (2 * far * near) / (near - far), 0];
}

function look() {
  const { yaw, pitch, distance } = camera;
  const [sy, cy, sp, cp] = [Math.sin(yaw), Math.cos(yaw), Math.sin(pitch), Math.cos(pitch)];
  return [cy, -sy * sp, sy * cp, 0, 0, cp, sp, 0, -sy, -cy * sp, cy * cp, 0, 0, 0, -distance, 1];
}

const pointers = new Map();
let moved = 0;

function turn(yaw, pitch) {
  camera.yaw += yaw;
  camera.pitch = Math.max(-1.5, Math.min(1.5, camera.pitch + pitch));
  draw();
}

function zoom(factor) {
  camera.distance = Math.max(0.8, Math.min(12, camera.distance * factor));
  draw();
}

function spread() {
  const [a, b] = [...pointers.values()];
  return Math.hypot(a.x - b.x, a.y - b.y);
}

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  moved = 0;
});
canvas.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (!before) return;
  const wide = pointers.size === 2 ? spread() : 0;
  pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  const [dx, dy] = [event.clientX - before.x, event.clientY - before.y];
  moved += Math.abs(dx) + Math.abs(dy);
  if (wide) zoom(wide / Math.max(spread(), 1));
  else turn(-dx * 0.008, dy * 0.008);
});
canvas.addEventListener("pointerup", (event) => {
  pointers.delete(event.pointerId);
  if (moved < 5 && meshes.length > 1 && props.value.is_over) choose(event);
});
canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(event.deltaY * 0.001));
}, { passive: false });
canvas.addEventListener("dblclick", () => reset());
canvas.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
  if (step) turn(...step);
  else if (event.key === "+" || event.key === "-") zoom(event.key === "+" ? 0.9 : 1.1);
  else return;
  event.preventDefault();
});
canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
canvas.addEventListener("webglcontextrestored", begin);

function choose(event) {
  const box = canvas.getBoundingClientRect();
  const [columns, rows] = grid(box.width, box.height);
  const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
  const index = Math.floor(((event.clientY - box.top) / box.height) * rows) * columns + column;
  if (index >= meshes.length) return;
  chosen = index;
  describe(props.value);
  trigger("select", { index });
}

function reset() {
  Object.assign(camera, START);
  draw();
}

function toggle(name, change) {
  const button = root.querySelector(`[data-does=${name}]`);
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(change()));
    draw();
  });
}

scrub.addEventListener("input", () => {
  shown = scrub.value === scrub.max ? Infinity : scrub.valueAsNumber;
  describe(props.value);
  draw();
});
toggle("wireframe", () => (wireframe = !wireframe));
toggle("turn", () => (turning = !turning));
root.querySelector("[data-does=reset]").addEventListener("click", reset);
new ResizeObserver(draw).observe(root);
watch("value", () => show(props.value));
begin();
show(props.value);
