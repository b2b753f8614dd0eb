"use strict";
(() => {
  const cases = JSON.parse(document.getElementById("cases").textContent);
  if (!cases.length) return;

  const element = (id) => document.getElementById(id);
  const players = [element("dense"), element("sparse")];
  const canvas = element("difference");
  const context = canvas.getContext("2d");
  const byId = new Map(cases.map((one) => [one.id, one]));
  const texts = new Map([...document.querySelectorAll("script[data-video]")].map((node) => [node.dataset.video, node]));

  // The last frames that each side has shown. The two present theirs at different moments, and a difference is only
  // drawn of two pictures with the same number.
  const KEPT = 4;
  const shown = players.map(() => Array.from({ length: KEPT }, () => ({ number: -1, picture: document.createElement("canvas") })));

  let current = null;
  let playing = false;
  let wanted = null;
  let seeking = false;

  const last = () => current.frames - 1;
  const numberAt = (seconds) => Math.min(last(), Math.max(0, Math.floor(seconds * current.fps + 1e-3)));

  function keep(side, number) {
    const slot = shown[side][number % KEPT];
    slot.picture.getContext("2d").drawImage(players[side], 0, 0, current.width, current.height);
    slot.number = number;
    if (shown[1 - side][number % KEPT].number === number) draw(number);
    if (side === 0) tell(number);
  }

  function draw(number) {
    context.globalCompositeOperation = "copy";
    context.drawImage(shown[0][number % KEPT].picture, 0, 0);
    context.globalCompositeOperation = "difference";
    context.drawImage(shown[1][number % KEPT].picture, 0, 0);
    canvas.dataset.frame = number;
  }

  function tell(number) {
    if (!seeking) element("seek").value = number;
    element("frame").textContent = `frame ${number + 1} of ${current.frames}`;
  }

  function setPlaying(value) {
    playing = value;
    element("play").textContent = value ? "Pause" : "Play";
    element("play").setAttribute("aria-pressed", String(value));
  }

  // Resolves when the player stands at the middle of the frame, or when another video was loaded meanwhile.
  function move(player, number) {
    return new Promise((resolve) => {
      const done = () => {
        player.removeEventListener("seeked", done);
        player.removeEventListener("emptied", done);
        resolve();
      };
      player.addEventListener("seeked", done);
      player.addEventListener("emptied", done);
      player.currentTime = (number + 0.5) / current.fps;
    });
  }

  async function seek(number) {
    wanted = Math.min(last(), Math.max(0, number));
    element("seek").value = wanted;
    if (seeking) return;
    seeking = true;
    while (wanted !== null) {
      const [target, of] = [wanted, current];
      wanted = null;
      await Promise.all(players.map((player) => move(player, target)));
      if (current === of) players.forEach((_, side) => keep(side, target));
    }
    seeking = false;
  }

  function pause() {
    players.forEach((player) => player.pause());
    setPlaying(false);
  }

  async function play() {
    if (numberAt(players[0].currentTime) >= last()) await seek(0);
    setPlaying(true);
    players[1].currentTime = players[0].currentTime;
    try {
      await Promise.all(players.map((player) => player.play()));
    } catch (error) {
      // Paused, or another video chosen, before it began.
      if (error.name !== "AbortError") throw error;
    }
  }

  async function step(by) {
    pause();
    await seek(numberAt(players[0].currentTime) + by);
  }

  async function finish() {
    if (!playing) return;
    pause();
    await seek(element("loop").checked ? 0 : last());
    if (element("loop").checked) await play();
  }

  function source(player, name) {
    const bytes = Uint8Array.from(atob(texts.get(name).textContent.split(",")[1]), (letter) => letter.charCodeAt(0));
    if (player.src) URL.revokeObjectURL(player.src);
    // Not the data: URL itself: some browsers cannot seek in one.
    player.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
    return new Promise((resolve) => {
      const events = ["loadeddata", "error", "emptied"];
      const done = () => {
        events.forEach((name) => player.removeEventListener(name, done));
        resolve();
      };
      // The change of src itself empties the player, at once.
      setTimeout(() => events.forEach((name) => player.addEventListener(name, done)));
      if (player.readyState >= 2) done();
    });
  }

  async function choose(one, number = 0) {
    pause();
    current = one;
    wanted = null;
    element("folder").value = one.folder;
    list(one.folder);
    element("video").value = one.id;
    element("prompt").textContent = one.prompt;
    element("sparse-name").textContent = one.folder;
    const values = [`PSNR ${one.psnr.toFixed(2)} dB`, `SSIM ${one.ssim.toFixed(4)}`];
    if (one.density !== null) values.push(`density ${one.density.toFixed(3)}`);
    element("values").textContent = values.join(", ");
    element("said").textContent = [["dense", one.dense_said], [one.folder, one.sparse_said]]
      .filter(([, said]) => said.length).map(([name, said]) => `${name}: ${said.join(", ")}`).join("; ");
    element("seek").max = last();
    for (const picture of [canvas, ...shown.flat().map((slot) => slot.picture)]) {
      picture.width = one.width;
      picture.height = one.height;
    }
    shown.flat().forEach((slot) => { slot.number = -1; });
    const place = cases.indexOf(one);
    element("previous").disabled = place === 0;
    element("next").disabled = place === cases.length - 1;
    await Promise.all([source(players[0], one.dense), source(players[1], one.id)]);
    players.forEach((player) => { player.playbackRate = Number(element("speed").value); });
    if (current === one) await seek(number);
  }

  function list(folder) {
    const options = cases.filter((one) => one.folder === folder);
    element("video").replaceChildren(...options.map((one) => new Option(`${one.name}: ${one.prompt}`, one.id)));
  }

  players.forEach((player, side) => {
    if (player.requestVideoFrameCallback) {
      const present = (_, frame) => {
        if (current) keep(side, Math.min(last(), Math.round(frame.mediaTime * current.fps)));
        player.requestVideoFrameCallback(present);
      };
      player.requestVideoFrameCallback(present);
    } else {
      player.addEventListener("timeupdate", () => keep(side, numberAt(player.currentTime)));
    }
    player.addEventListener("ended", finish);
    player.addEventListener("error", () => { element("values").textContent = "this browser cannot play the video"; });
  });
  players[0].addEventListener("timeupdate", () => {
    // Apart by more than an eye forgives, in seconds: the second follows the first.
    const apart = Math.abs(players[0].currentTime - players[1].currentTime);
    if (playing && !players[0].ended && apart > 0.05) players[1].currentTime = players[0].currentTime;
  });

  const neighbour = (by) => choose(cases[cases.indexOf(current) + by]);
  element("play").addEventListener("click", () => (playing ? pause() : play()));
  element("back").addEventListener("click", () => step(-1));
  element("forward").addEventListener("click", () => step(1));
  element("previous").addEventListener("click", () => neighbour(-1));
  element("next").addEventListener("click", () => neighbour(1));
  element("seek").addEventListener("input", (event) => { pause(); seek(Number(event.target.value)); });
  element("speed").addEventListener("change", (event) => {
    players.forEach((player) => { player.playbackRate = Number(event.target.value); });
  });
  const amplify = () => {
    canvas.style.filter = `brightness(${element("amplify").value})`;
    element("factor").textContent = `${element("amplify").value} x`;
  };
  element("amplify").addEventListener("input", amplify);
  element("video").addEventListener("change", (event) => choose(byId.get(event.target.value)));
  element("folder").addEventListener("change", (event) => {
    // The same video of another folder, where it is here.
    const options = cases.filter((one) => one.folder === event.target.value);
    choose(options.find((one) => one.name === current.name) || options[0]);
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-case]");
    if (link && byId.has(link.dataset.case)) choose(byId.get(link.dataset.case), Number(link.dataset.frame || 0));
  });
  element("stage").addEventListener("keydown", (event) => {
    const action = { " ": () => (playing ? pause() : play()), ArrowLeft: () => step(-1), ArrowRight: () => step(1) }[event.key];
    if (action) { event.preventDefault(); action(); }
  });

  element("folder").replaceChildren(...[...new Set(cases.map((one) => one.folder))].map((name) => new Option(name, name)));
  amplify();
  choose(cases[0]);
})();
