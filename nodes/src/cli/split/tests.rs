use super::*;
use proptest::prelude::*;

fn texts(format: Format, content: &str) -> Vec<String> {
    split(format, "f", content).into_iter().map(|p| p.text).collect()
}

fn visible<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    texts.into_iter().flat_map(str::chars).filter(|c| !c.is_whitespace()).collect()
}

fn sentence(words: usize) -> String {
    format!("A{}.", " word".repeat(words))
}

#[test]
fn the_extension_tells_the_format() {
    for (path, format) in [
        ("a/b.JSONL", Format::Jsonl),
        ("x.ndjson", Format::Jsonl),
        ("README.md", Format::Markdown),
        ("x.markdown", Format::Markdown),
        ("COPYING", Format::Text),
        ("md", Format::Text),
        ("x.md.txt", Format::Text),
    ] {
        assert_eq!(Format::of(path), format, "{path}");
    }
}

#[test]
fn binary_is_told_from_text() {
    assert!(looks_binary(b"\x7fELF\x02\x01\x01\0\0"));
    assert!(looks_binary(b"%PDF-1.7 plain so far"));
    assert!(looks_binary(&[0x1f, 0x8b, 8, 3, 0xff, 0xfe, 0x91]));
    for text in ["", "plain\r\n\ttext\x0c", "naïve 日本語", "\x1b[1mbold\x1b[0m and o\x08overstruck"] {
        assert!(!looks_binary(text.as_bytes()), "{text}");
    }
    assert!(!looks_binary(b"caf\xe9 in Latin-1 is text all the same"));
    let cut_in_a_character = "é".repeat(5000);
    assert!(!looks_binary(&cut_in_a_character.as_bytes()[..8191]));
}

#[test]
fn each_filled_line_of_jsonl_is_a_passage() {
    let passages = split(Format::Jsonl, "f", "\u{feff}{\"text\":1}\r\n\n  {}  ");
    let found: Vec<_> = passages.iter().map(|p| (p.text.as_str(), p.line)).collect();
    assert_eq!(found, [("{\"text\":1}", 1), ("{}", 3)]);
}

#[test]
fn wrapped_lines_of_a_manual_are_joined() {
    let manual = "NAME\n       ls - list directory contents\n\n       List  information  about the FILEs (the current di-\n       rectory by default).  Sort entries alphabetically\n       if none of -cftuvSUX nor --sort is specified.\n";
    assert_eq!(
        texts(Format::Text, manual),
        [
            "NAME ls - list directory contents\n\nList information about the FILEs (the current di-rectory by default). \
              Sort entries alphabetically if none of -cftuvSUX nor --sort is specified."
        ]
    );
}

#[test]
fn a_number_at_a_line_start_is_an_item_only_after_a_sentence() {
    let text = "All of this goes on and on, according to section\n7. It says a good deal more than one would think.\n8. So does this one.";
    let expected = "All of this goes on and on, according to section 7. It says a good deal more than one would think.\n8. So does this one.";
    assert_eq!(texts(Format::Text, text), [expected]);
}

#[test]
fn code_and_verse_keep_their_lines() {
    let code = "  fn main() {\n      run();\n  }";
    assert_eq!(texts(Format::Text, code), ["fn main() {\n    run();\n}"]);
    let verse = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye,";
    assert_eq!(texts(Format::Text, verse), [verse]);
}

#[test]
fn short_paragraphs_are_joined_and_long_ones_end_at_sentences() {
    let content = format!(
        "Short.\n\nAlso short.\n\n{}",
        [sentence(30), sentence(40), sentence(50)].join(" ").repeat(3)
    );
    let found = split(Format::Text, "f", &content);
    assert!(found[0].text.starts_with("Short.\n\nAlso short.\n\nA word"));
    assert!(found.len() > 1);
    for passage in &found {
        let chars = passage.text.chars().count();
        assert!((TARGET_MIN..=TARGET_MAX + TARGET_MIN).contains(&chars), "{chars}");
        assert!(passage.text.ends_with('.'), "{}", passage.text);
    }
    assert_eq!(found[1].line, 5);
}

#[test]
fn abbreviations_and_initials_end_no_sentence() {
    let text = "Dr. J. Smith (e.g. 5 of them) came. \"Did he?\" Yes. v1.2 is out, i.e. Tuesday's… well. End";
    let mut start = 0;
    let mut found = Vec::new();
    for end in sentence_ends(text) {
        found.push(text[start..end].trim());
        start = end;
    }
    assert_eq!(
        found,
        ["Dr. J. Smith (e.g. 5 of them) came.", "\"Did he?\"", "Yes. v1.2 is out, i.e. Tuesday's… well."]
    );
    assert_eq!(sentence_ends("2. Two.\n3. Three."), [7]);
    assert_eq!(sentence_ends("今日は。明日も。"), [12]);
}

#[test]
fn a_text_without_seams_is_cut_between_characters() {
    let found = texts(Format::Text, &"é".repeat(4000));
    assert!(found.iter().all(|t| t.chars().count() <= HARD_MAX));
    assert_eq!(found.concat(), "é".repeat(4000));
}

#[test]
fn markdown_sections_carry_their_path() {
    let content = "---\ntitle: x\n---\nIntro.\n\n# One #\n## Two\nText of\ntwo.\n\n## Empty\n# C#\n\nThree\n=====\n* * *\nLast.\n\nFour\n---\n";
    let found: Vec<_> =
        split(Format::Markdown, "f", content).into_iter().map(|p| (p.heading, p.text, p.line)).collect();
    let expected = [
        ("", "Intro.", 4),
        ("One > Two", "Text of\ntwo.", 8),
        ("One > Empty", "Empty", 11),
        ("C#", "C#", 12),
        ("Three", "Last.", 17),
        ("Three > Four", "Four", 19),
    ];
    assert_eq!(found, expected.map(|(heading, text, line)| (heading.into(), text.into(), line)));
}

#[test]
fn lists_fences_and_tables_stay_whole() {
    let list = "- one\n  goes on\n  - nested\n\n- two\n";
    let fence = "```sh\n# no heading\n\n- no list\n```";
    let table = "| a | b |\n|---|---|\n| 1 | 2 |";
    let content = format!("Intro:\n{list}\n{fence}\n{table}\n");
    assert_eq!(
        texts(Format::Markdown, &content),
        [format!("Intro:\n\n{}\n\n{fence}\n\n{table}", list.trim_end())]
    );

    let long = format!("```\n{}```", "    let x = call(1, 2, 3);\n".repeat(40));
    let found = texts(Format::Markdown, &format!("{}\n\n{long}", sentence(100)));
    assert_eq!(found[1], long.trim_end(), "a fence within the limit is one passage");
    let found =
        texts(Format::Markdown, &long.replace("```\n ", "```\n\n ").replace("let", &"let ".repeat(5)));
    assert!(
        found.len() > 1 && found[1].starts_with("    let"),
        "a longer one is divided at line ends: {found:?}"
    );
}

#[test]
fn a_long_list_is_divided_between_items() {
    let item = format!("- {}\n  {}\n", sentence(30), sentence(20));
    for passage in texts(Format::Markdown, &item.repeat(12)) {
        assert!(passage.starts_with("- A") && passage.ends_with('.'), "{passage}");
        assert!(passage.matches("- A").count() * 2 == passage.matches('A').count(), "{passage}");
    }
}

#[test]
fn front_matter_that_never_closes_is_text() {
    assert_eq!(texts(Format::Markdown, "+++\nwords"), ["+++\nwords"]);
}

fn any_text() -> impl Strategy<Value = String> {
    let token = prop_oneof![
        8 => "[a-zA-Zéß日]{1,9}",
        3 => "[.!?:;-]{1,2}",
        3 => Just("\n".to_string()),
        2 => Just("\n\n".to_string()),
        2 => "[ \t]{1,5}",
        1 => prop::sample::select(vec!["\n- ", "\n  * ", "\n3. ", "\n```\n", "\n~~~", "\n# ", "\n---\n", "\n===\n", "\r\n", "|", "> ", "-\n"])
            .prop_map(String::from),
        1 => "[a-z]{1,1} ".prop_map(|w| w.repeat(400)),
        1 => "\\PC{0,20}",
    ];
    let word = (token, any::<bool>()).prop_map(|(t, spaced)| if spaced { t + " " } else { t });
    prop::collection::vec(word, 0..120).prop_map(|tokens| tokens.concat())
}

proptest! {
    #[test]
    fn text_keeps_every_visible_character_in_order(content in any_text()) {
        let passages = split(Format::Text, "f", &content);
        let content = content.strip_prefix('\u{feff}').unwrap_or(&content);
        prop_assert_eq!(visible(passages.iter().map(|p| p.text.as_str())), visible([content]));
    }

    #[test]
    fn passages_are_filled_bounded_and_in_order(content in any_text(), markdown: bool) {
        let format = if markdown { Format::Markdown } else { Format::Text };
        let passages = split(format, "f", &content);
        let lines: Vec<&str> = content.lines().collect();
        let mut line = 1;
        for passage in &passages {
            prop_assert!((1..=HARD_MAX).contains(&passage.text.chars().count()));
            prop_assert!(passage.line >= line && passage.line <= lines.len());
            line = passage.line;
            let first = passage.text.split_whitespace().next().unwrap();
            let first: String = first.chars().take(4).collect();
            let here = visible(lines[line - 1..].iter().copied().take(2));
            prop_assert!(here.contains(&visible([first.as_str()])), "{} is not in line {}: {}", first, line, here);
        }
    }

    #[test]
    fn markdown_keeps_the_words_of_every_block_and_heading(
        blocks in prop::collection::vec((0..5, "[a-zA-Z]{1,12}( [a-z]{1,9}[.,]?){0,200}"), 0..8)
    ) {
        let mut content = String::new();
        let mut body = String::new();
        let mut headings = Vec::new();
        for (kind, words) in &blocks {
            let short: String = words.chars().take(60).collect();
            let block = match kind {
                0 => { headings.push(short.trim().to_string()); content += &format!("## {short}\n\n"); continue }
                1 => format!("- {}\n", words.replace(". ", ".\n  ")),
                2 => format!("```\n{}\n```\n", words.replace(". ", ".\n\n# ")),
                3 => format!("| {words} |\n"),
                _ => format!("{}\n", words.replace(". ", ".\n")),
            };
            content += &format!("{block}\n");
            body += &block;
        }
        let passages = split(Format::Markdown, "f", &content);
        let is_bare = |p: &&Passage| p.heading != p.text;
        prop_assert_eq!(visible(passages.iter().filter(is_bare).map(|p| p.text.as_str())), visible([body.as_str()]));
        for heading in headings {
            prop_assert!(passages.iter().any(|p| p.heading == heading), "{} is lost", heading);
        }
    }
}
