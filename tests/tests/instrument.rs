//! The simulator as an instrument: planted bugs are caught, failing runs are shrunk, the replay's page works in a browser, and the guide's
//! commands do what it says.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use tests::{Directory, Result, loci, root};

/// Found on the first seeds, and needs no fault.
const EASY: &str = "search-the-words-of-all-tenants";

fn cargo(args: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).args(args);
    // The outer build's settings must not leak into the inner one.
    command.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    Ok(command.stdin(Stdio::null()).output()?)
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn exits(args: &[&str], code: i32) -> Result<String> {
    cargo_exits(&[&["sim"], args].concat(), code)
}

fn cargo_exits(args: &[&str], code: i32) -> Result<String> {
    let output = cargo(args)?;
    if output.status.code() != Some(code) {
        return Err(
            format!("cargo {args:?} gave {} instead of {code}:\n{}", output.status, text(&output)).into()
        );
    }
    Ok(text(&output))
}

#[test]
fn a_planted_bug_is_caught_and_is_not_in_the_program_that_people_run() -> Result<()> {
    let found = exits(&["mutants", "--seeds", "1..=3", EASY, "--json"], 0)?;
    assert!(found.contains("\"caught\":true") && found.contains("\"promise\":\"P7\""), "{found}");
    let program = std::fs::read(loci()?)?;
    let list = exits(&["mutants", "--list"], 0)?;
    let names: Vec<&str> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.len() >= 12, "{list}");
    for name in names {
        let there = program.windows(name.len()).any(|window| window == name.as_bytes());
        assert!(!there, "the planted bug {name} is in production's program");
    }
    Ok(())
}

#[test]
fn a_failing_run_is_shrunk_and_passes_without_its_bug() -> Result<()> {
    let dir = Directory::new("shrink")?;
    let file = dir.0.join("small.toml").to_string_lossy().into_owned();
    exits(&["shrink", "steady", "--seed", "1", "--mutant", EASY, "--out", &file, "--minutes", "2"], 0)?;
    let small = std::fs::read_to_string(&file)?;
    let operations = small.lines().filter(|line| line.starts_with("    \"")).count();
    assert!((1..=20).contains(&operations), "{operations} operations are left:\n{small}");
    exits(&["run", &file, "--mutant", EASY], 10)?;
    exits(&["run", &file], 0)?;
    Ok(())
}

/// What is done to the page, and what must come of it; written into the page's end.
const USE_THE_PAGE: &str = r##"<script>
const seen = document.body.dataset, said = [], inSight = () => seen.to - seen.from;
const check = (what, holds) => said.push((holds ? "ok " : "NOT ") + what);
const key = (key, more) => dispatchEvent(new KeyboardEvent("keydown", { key, ...more }));
const pixels = color => { paint(); const canvas = document.getElementById("board"), all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const probe = document.createElement("canvas").getContext("2d"); probe.fillStyle = css(color); probe.fillRect(0, 0, 1, 1); const want = probe.getImageData(0, 0, 1, 1).data;
  let count = 0; for (let at = 0; at < all.length; at += 4) if ([0, 1, 2].every(i => Math.abs(all[at + i] - want[i]) < 12)) count++; return count; };
const atProof = v => Math.abs(seen.cursor - (v.ops.length ? run.ops[v.ops[0]].to : v.at)) < 0.001;
check("opens at the violation", atProof(run.violations[0]));
check("tells the story of what breaks the promise", !document.getElementById("story").hidden && run.violations[0].story.length > 0 && run.ops[run.violations[0].ops[0]].on !== null);
check("marks the violation", pixels("red") > 200);
check("names the operations that prove it", proofs.size > 0);
key("0"); const whole = inSight(); check("shows the whole run", Math.abs(whole - run.end) < 0.001);
key("+"); const closer = inSight(); check("zooms in by key", closer < whole);
document.getElementById("board").dispatchEvent(new WheelEvent("wheel", { deltaY: -300, cancelable: true })); check("zooms in by wheel", inSight() < closer);
const left = +seen.from; key("ArrowRight", { shiftKey: true }); check("pans", +seen.from > left);
key("Home"); check("goes to the start", +seen.cursor === 0); key("ArrowRight"); check("scrubs", +seen.cursor > 0);
key("m"); check("shows messages", seen.messages === "true"); key("m");
const find = document.getElementById("find"); find.value = "leads now"; find.dispatchEvent(new Event("input")); const few = +seen.hits; paint();
check("finds and filters", few > 0 && few < items.length && document.querySelectorAll("#list li").length <= few); find.value = ""; find.dispatchEvent(new Event("input"));
key("v"); check("comes back to a violation", run.violations.some(atProof));
const earlier = +seen.cursor; key("ArrowUp"); check("goes to the event before", +seen.cursor < earlier && seen.chosen.length > 5); key("ArrowDown"); key("ArrowDown"); check("and to those after", +seen.cursor >= earlier);
const kind = document.getElementById("kind"), rest = items.filter(i => i.kind === "op" || i.kind === "proof").length; kind.value = "op proof"; kind.dispatchEvent(new Event("change")); check("lists one kind alone", shown.length === rest && rest < items.length); kind.value = ""; kind.dispatchEvent(new Event("change"));
document.querySelector("#list li").click(); check("chooses an event", document.getElementById("chosen").textContent.length > 5);
key("v"); key("t"); check("is drawn in the dark too", pixels("red") + pixels("green") > 50 && document.documentElement.dataset.theme === "dark");
document.body.innerHTML = "<pre id=said></pre>"; document.getElementById("said").textContent = "RESULT\n" + said.join("\n") + "\nEND";
</script>"##;

#[test]
fn the_page_of_a_replay_works_in_a_browser() -> Result<()> {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let there = |name: &&str| {
        let run = Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        run.is_ok_and(|status| status.success())
    };
    let Some(browser) = names.into_iter().find(|name| there(name)) else {
        eprintln!("SKIPPED: there is no chromium on this machine, so nobody has looked at the replay's page");
        return Ok(());
    };
    let dir = Directory::new("page")?;
    let file = dir.0.join("replay.html").to_string_lossy().into_owned();
    exits(&["replay", "steady", "--seed", "1", "--mutant", EASY, "--html", &file], 10)?;
    let page = std::fs::read_to_string(&file)?;
    std::fs::write(&file, page.replace("</html>", &format!("{USE_THE_PAGE}</html>")))?;
    let mut command = Command::new(browser);
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--dump-dom"]);
    command.arg(format!("--user-data-dir={}", dir.0.join("profile").display()));
    let output = command.arg(format!("file://{file}")).stdin(Stdio::null()).output()?;
    let shown = String::from_utf8_lossy(&output.stdout);
    let said = shown.split_once("RESULT").and_then(|(_, rest)| rest.split_once("END")).map(|(said, _)| said);
    let said = said.ok_or_else(|| {
        format!("the page's script did not end: {}", text(&output).chars().take(2000).collect::<String>())
    })?;
    assert!(!said.contains("NOT ") && said.matches("ok ").count() == 18, "{said}");
    Ok(())
}

/// The commands of the guide's `sh` blocks, and the exit codes that it names.
fn commands(guide: &Path) -> Result<Vec<(String, i32)>> {
    let text = std::fs::read_to_string(guide)?;
    let blocks = text.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let lines = blocks.flat_map(str::lines).filter(|line| line.starts_with("cargo "));
    lines
        .map(|line| {
            let (command, comment) = line.split_once('#').unwrap_or((line, ""));
            let code = comment.split_once("exit code ").map_or(Ok(0), |(_, rest)| {
                rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse()
            })?;
            Ok((command.trim().trim_start_matches("cargo ").to_string(), code))
        })
        .collect()
}

#[test]
fn the_commands_of_the_guide_do_what_it_says() -> Result<()> {
    let dir = Directory::new("guide")?;
    let all = commands(&root().join("scenarios/README.md"))?;
    assert!(all.len() >= 10, "{all:?}");
    for (command, code) in all {
        let command = command.replace("/tmp/", &format!("{}/", dir.0.display()));
        cargo_exits(&command.split_whitespace().collect::<Vec<_>>(), code)?;
    }
    Ok(())
}
