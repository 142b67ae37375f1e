"""What FPGA tools read: hls4ml projects, QONNX files and Verilog, each equal to the integer reference."""
