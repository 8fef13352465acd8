//! Writes GGUF files, also such as nobody else would.

/// A value of the metadata.
#[derive(Clone, Debug)]
pub enum Meta {
    U16(u16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Ints(Vec<i32>),
    /// Type and bytes, whatever they are.
    Raw(u32, Vec<u8>),
}

impl Meta {
    pub fn text(text: &str) -> Self {
        Self::Text(text.into())
    }

    /// Code of the type, and the bytes after it.
    fn bytes(&self) -> (u32, Vec<u8>) {
        let list = |code: u32, count: usize, elements: Vec<u8>| {
            (9, [&code.to_le_bytes(), (count as u64).to_le_bytes().as_slice(), &elements].concat())
        };
        match self {
            Self::U16(number) => (2, number.to_le_bytes().into()),
            Self::U32(number) => (4, number.to_le_bytes().into()),
            Self::I32(number) => (5, number.to_le_bytes().into()),
            Self::F32(number) => (6, number.to_le_bytes().into()),
            Self::Bool(flag) => (7, vec![u8::from(*flag)]),
            Self::Text(text) => (8, text_bytes(text)),
            Self::Texts(texts) => list(8, texts.len(), texts.iter().flat_map(|text| text_bytes(text)).collect()),
            Self::Floats(all) => list(6, all.len(), all.iter().flat_map(|number| number.to_le_bytes()).collect()),
            Self::Ints(all) => list(5, all.len(), all.iter().flat_map(|number| number.to_le_bytes()).collect()),
            Self::Raw(code, bytes) => (*code, bytes.clone()),
        }
    }
}

fn text_bytes(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    /// Slowest first; in the file it is the other way round.
    pub shape: Vec<usize>,
    /// 0 is F32, 1 is F16, 30 is BF16.
    pub code: u32,
    pub bytes: Vec<u8>,
}

/// A file to be written.
#[derive(Clone, Debug)]
pub struct GgufFile {
    pub magic: [u8; 4],
    pub version: u32,
    /// Where tensors begin: at multiples of so many bytes. Metadata say so if it is not 32.
    pub alignment: usize,
    pub metadata: Vec<(String, Meta)>,
    pub tensors: Vec<Tensor>,
}

impl Default for GgufFile {
    fn default() -> Self {
        Self { magic: *b"GGUF", version: 3, alignment: 32, metadata: Vec::new(), tensors: Vec::new() }
    }
}

impl GgufFile {
    /// Sets a key, in place of what it had.
    pub fn set(&mut self, key: &str, value: Meta) {
        self.remove(key);
        self.metadata.push((key.into(), value));
    }

    pub fn remove(&mut self, key: &str) {
        self.metadata.retain(|(other, _)| other != key);
    }

    pub fn tensor(&mut self, name: &str, shape: &[usize], code: u32, bytes: Vec<u8>) {
        self.tensors.push(Tensor { name: name.into(), shape: shape.into(), code, bytes });
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut metadata = self.metadata.clone();
        if self.alignment != 32 {
            metadata.push(("general.alignment".into(), Meta::U32(self.alignment as u32)));
        }
        let mut out = [self.magic, self.version.to_le_bytes()].concat();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in &metadata {
            let (code, bytes) = value.bytes();
            out.extend(text_bytes(key));
            out.extend(code.to_le_bytes());
            out.extend(bytes);
        }
        let mut data = Vec::new();
        for Tensor { name, shape, code, bytes } in &self.tensors {
            out.extend(text_bytes(name));
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|&size| out.extend((size as u64).to_le_bytes()));
            out.extend(code.to_le_bytes());
            data.resize(data.len().next_multiple_of(self.alignment), 0);
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }
}
