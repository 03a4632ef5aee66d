//! `loci import`: files and folders into memories.
//!
//! A passage's id derives from its source, its text and its owner, so running an import again, after an interruption or a change of
//! some files, adds only what is not there yet. Batches are sent side by side and retried.

use super::client::{Client, To};
use super::jsonl::parse_jsonl_line;
use super::memories::{Whose, memory_type, scope};
use super::split::{Format, Passage, looks_binary, split};
use super::{Done, Failure};
use clap::Args;
use futures::{StreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use nodes::proto::v1;
use sim::time::Duration;
use std::fs;
use std::path::{Path, PathBuf};

const BATCH: usize = 100;
/// A batch's texts in bytes.
const BATCH_BYTES: usize = 1 << 20;
const IN_FLIGHT: usize = 4;
const ATTEMPTS_MAX: u32 = 8;
const FILE_BYTES_MAX: u64 = 256 << 20;

#[derive(Args)]
pub struct Import {
    /// Files or folders. Hidden and binary files in folders are passed over.
    #[arg(required = true)]
    pub paths: Vec<PathBuf>,
    #[command(flatten)]
    pub whose: Whose,
    /// private, shared or global.
    #[arg(long, default_value = "private")]
    pub scope: String,
    /// Names the model of vectors in JSONL files.
    #[arg(long, default_value = "")]
    pub space: String,
}

/// What came of an import.
#[derive(Clone, Copy, Debug, Default)]
pub struct Imported {
    pub added: usize,
    pub there_already: usize,
    pub refused: usize,
}

pub async fn run(to: &To, import: Import) -> Done {
    let client = to.connect()?;
    let mut files = vec![];
    for path in &import.paths {
        gather(path, true, &mut files)?;
    }
    if files.is_empty() {
        return Err(Failure("there is no file to import; hidden ones in folders are passed over".into()));
    }
    let mut memories = vec![];
    let (mut passed_over, mut wrong) = (0, 0);
    for file in &files {
        match read(file, &import) {
            Ok(Some((found, problems))) => {
                memories.extend(found);
                wrong += problems.len();
                problems.iter().for_each(|p| eprintln!("{p}"));
            }
            Ok(None) => passed_over += 1,
            Err(Failure(problem)) => {
                eprintln!("{problem}");
                wrong += 1;
            }
        }
    }
    let bar = if to.json { ProgressBar::hidden() } else { ProgressBar::new(memories.len() as u64) };
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} passages, {per_sec}, {eta} left") {
        bar.set_style(style);
    }
    let mut done = send(&client, memories, &bar).await?;
    bar.finish_and_clear();
    done.refused += wrong;
    if to.json {
        println!(
            "{}",
            serde_json::json!({ "files": files.len(), "passed_over": passed_over, "added": done.added,
                "there_already": done.there_already, "refused": done.refused })
        );
    } else {
        println!(
            "{} files: {} memories added, {} there already, {} refused; {passed_over} binary files passed over",
            files.len(),
            done.added,
            done.there_already,
            done.refused
        );
    }
    if done.refused > 0 {
        Err(Failure(format!("{} could not be imported, see above", done.refused)))
    } else {
        Ok(())
    }
}

/// Files under `path`, in the order of their names.
fn gather(path: &Path, named: bool, files: &mut Vec<PathBuf>) -> Done {
    let about = fs::metadata(path).map_err(|e| Failure(format!("{}: {e}", path.display())))?;
    let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
    if hidden && !named {
        return Ok(());
    }
    if about.is_dir() {
        let mut entries = fs::read_dir(path)?.map(|e| Ok(e?.path())).collect::<std::io::Result<Vec<_>>>()?;
        entries.sort();
        // A link that leads nowhere is passed over in a folder.
        entries.iter().filter(|p| p.exists()).try_for_each(|p| gather(p, false, files))
    } else {
        files.push(path.to_path_buf());
        Ok(())
    }
}

/// A file's memories, and what is wrong in it.
type Content = (Vec<v1::NewMemory>, Vec<String>);

/// What a file holds; `None` if it is binary.
fn read(path: &Path, import: &Import) -> Result<Option<Content>, Failure> {
    let failed = |e: std::io::Error| Failure(format!("{}: {e}", path.display()));
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > FILE_BYTES_MAX {
        return Err(Failure(format!(
            "{}: {size} bytes; split it, {FILE_BYTES_MAX} are the most",
            path.display()
        )));
    }
    let bytes = fs::read(path).map_err(failed)?;
    if looks_binary(&bytes) {
        return Ok(None);
    }
    let source = path.to_string_lossy();
    let format = Format::of(path);
    let jsonl = matches!(format, Format::Jsonl);
    let (mut memories, mut problems) = (vec![], vec![]);
    for passage in split(format, &source, &String::from_utf8_lossy(&bytes)) {
        let line = passage.line;
        let memory = if jsonl { from_jsonl(&passage, import) } else { from_passage(passage, import) };
        match memory {
            Ok(memory) => memories.push(memory),
            Err(Failure(problem)) => problems.push(format!("{source}:{line}: {problem}")),
        }
    }
    Ok(Some((memories, problems)))
}

/// An id that is the same whenever the same thing is imported for the same owner.
fn derive(memory: &v1::NewMemory, source: &str) -> String {
    let parts = [source, &memory.text, &memory.user, &memory.agent];
    let key = blake3::hash(parts.join("\u{0}").as_bytes()).to_hex();
    nodes::convert::id_text(&nodes::convert::derived_id("import", &format!("{key}/{}", memory.scope)))
}

fn from_passage(passage: Passage, import: &Import) -> Result<v1::NewMemory, Failure> {
    let metadata =
        serde_json::json!({ "source": passage.source, "line": passage.line, "heading": passage.heading });
    let text = match passage.heading.as_str() {
        "" => passage.text,
        heading => format!("{heading}\n{}", passage.text),
    };
    let mut memory = v1::NewMemory {
        scope: scope(&import.scope)?,
        user: import.whose.user.clone(),
        agent: import.whose.agent.clone(),
        text,
        metadata: metadata.to_string(),
        ..Default::default()
    };
    memory.id = derive(&memory, &passage.source);
    Ok(memory)
}

fn from_jsonl(passage: &Passage, import: &Import) -> Result<v1::NewMemory, Failure> {
    let line = parse_jsonl_line(&passage.text)?;
    let vector = line.vector.unwrap_or_default();
    if !vector.is_empty() && import.space.is_empty() {
        return Err(Failure("has a vector; name its model with --space".into()));
    }
    let mut memory = v1::NewMemory {
        id: line.id.unwrap_or_default(),
        scope: scope(line.scope.as_deref().unwrap_or(&import.scope))?,
        user: line.user.unwrap_or_else(|| import.whose.user.clone()),
        agent: line.agent.unwrap_or_else(|| import.whose.agent.clone()),
        session: line.session.unwrap_or_default(),
        text: line.text,
        metadata: line.metadata.map_or(String::new(), |m| serde_json::Value::Object(m).to_string()),
        r#type: line.memory_type.as_deref().map_or(Ok(0), memory_type)?,
        importance: line.importance.unwrap_or(0.0),
        categories: line.categories,
        event_time: line.event_time.unwrap_or(0),
        expires: line.expires.unwrap_or(0),
        space: if vector.is_empty() { String::new() } else { import.space.clone() },
        vector,
        ..Default::default()
    };
    if memory.id.is_empty() {
        let key = line.key.unwrap_or_else(|| passage.source.clone());
        memory.id = derive(&memory, &key);
    }
    Ok(memory)
}

/// Memories of a JSONL text.
pub fn parse(text: &str, source: &str, user: &str) -> Result<Vec<v1::NewMemory>, Failure> {
    let whose = Whose { user: user.into(), agent: String::new() };
    let import = Import { paths: vec![], whose, scope: "private".into(), space: String::new() };
    split(Format::Jsonl, source, text).iter().map(|passage| from_jsonl(passage, &import)).collect()
}

/// Sends memories in batches. Each item is decided on its own; one that is there already is no error.
pub async fn send(
    client: &Client,
    memories: Vec<v1::NewMemory>,
    bar: &ProgressBar,
) -> Result<Imported, Failure> {
    let mut batches: Vec<Vec<v1::AddRequest>> = vec![];
    let mut bytes = 0;
    for memory in memories {
        if batches.last().is_none_or(|b| b.len() == BATCH || bytes > BATCH_BYTES) {
            batches.push(vec![]);
            bytes = 0;
        }
        bytes += memory.text.len() + 4 * memory.vector.len();
        if let Some(batch) = batches.last_mut() {
            batch.push(v1::AddRequest { memory: Some(memory), options: None });
        }
    }
    let sends = batches.into_iter().map(|items| async move {
        let count = items.len() as u64;
        let results = batch(client, items).await;
        bar.inc(count);
        results
    });
    let mut sending = stream::iter(sends).buffer_unordered(IN_FLIGHT);
    let mut done = Imported::default();
    while let Some(results) = sending.next().await {
        for result in results? {
            match result.error {
                None => done.added += 1,
                Some(error) if error.reason == "ALREADY_EXISTS" => done.there_already += 1,
                Some(error) => {
                    done.refused += 1;
                    bar.suspend(|| eprintln!("refused: {}", error.message));
                }
            }
        }
    }
    Ok(done)
}

async fn batch(client: &Client, items: Vec<v1::AddRequest>) -> Result<Vec<v1::BatchAddResult>, Failure> {
    let mut attempt = 0;
    loop {
        let request = client.request(v1::BatchAddRequest { items: items.clone() });
        match client.memories().batch_add(request).await {
            Ok(answer) => return Ok(answer.into_inner().results),
            // Ids are fixed, so sending a batch again adds nothing twice.
            Err(status)
                if attempt < ATTEMPTS_MAX
                    && matches!(
                        status.code(),
                        tonic::Code::Unavailable
                            | tonic::Code::DeadlineExceeded
                            | tonic::Code::ResourceExhausted
                    ) =>
            {
                sim::time::sleep(Duration::from_millis(100 << attempt)).await;
                attempt += 1;
            }
            Err(status) => {
                let Failure(why) = client.explain(status);
                return Err(Failure(format!("{why}; what was sent is kept, run the import again to go on")));
            }
        }
    }
}
