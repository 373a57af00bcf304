//! The elementwise chains between matrix products, each as one pass over memory on the CPU.
//!
//! Every kernel is compared with its plain-tensor form in its own tests. Arithmetic is f32, whatever the storage;
//! results do not depend on the number of threads.

pub mod attention;
pub mod cuda {
    pub fn load(_: usize) -> Result<String, String> {
        Err("none".to_owned())
    }
}
pub mod reduce;
pub mod rms_norm;
pub mod rotary;
pub mod softmax;
pub mod swiglu;

mod real;
